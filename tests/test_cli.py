"""The command line: help, what is imported, exit codes."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from PIL import Image

from commands import complains
from fastdit import __version__, cli
from fastdit.config import InputError, Interrupted, SampleConfig, Stopped
from fastdit.sampling.command import sampler_settings


def subparser(command):
    (action,) = (a for a in cli.make_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices[command]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_text_is_a_sentence(command):
    """It stands without the name of its option, and says the default."""
    parser = subparser(command)
    assert parser.description.endswith(".")
    for action in parser._actions:
        text = action.help or ""
        assert text[:1].isupper() or text.startswith("ILSVRC"), (action.dest, text)
        assert text.endswith("."), (action.dest, text)
        if action.default not in (None, False, argparse.SUPPRESS, parser.get_default("load_dir")) and action.option_strings:
            assert "default: %(default)" in text, (action.dest, text)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_examples_of_the_help_parse(command):
    for line in (subparser(command).epilog or "").splitlines():
        if line.startswith("  "):
            words = shlex.split(line.partition("fastdit.cli ")[2] or line.partition("fastdit ")[2])
            cli.make_parser(words[0]).parse_args(words)


def test_the_help_starts_with_train_sample_evaluate():
    assert list(cli.COMMANDS)[:3] == ["train", "sample", "evaluate"]
    words = [line.split()[1] for line in cli.START.splitlines()[1:]]
    assert words == ["train", "sample", "evaluate"]
    assert set(re.findall(r"^    ([a-z-]+) ", cli.make_parser().format_help(), re.M)) == set(cli.COMMANDS)


def test_every_sampler_setting_is_an_option():
    """Of sample, evaluate and sweep alike; those that are not given are the run's."""
    values = {"steps": 3, "solver": "heun", "guidance": 0.5, "guidance_low": 0.0, "guidance_high": 0.25, "time_shift": 2.0}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    values["path_drop_guidance"] = True
    words.append("--path-drop-guidance")
    assert values.keys() == {f.name for f in fields(SampleConfig)}
    for start in (["sample"], ["evaluate", "--features", "digits"], ["sweep", "run", "steps=1", "--features", "digits"]):
        assert sampler_settings(cli.make_parser(start[0]).parse_args([*start, *words])) == values
        assert sampler_settings(cli.make_parser(start[0]).parse_args(start)) == {}


def test_overrides_may_follow_options(capsys):
    assert cli.main(["train", "model.depth=3", "--dry-run", "train.clip=2"]) == 0
    out = capsys.readouterr().out
    assert "depth: 3" in out and "clip: 2.0" in out


@pytest.mark.parametrize(
    "words", [["train", "--dry-run", "--nonsense"], ["train", "a.b=1", "--dry-run", "c.yaml"], ["export", "a=b"], ["x"]]
)
def test_unknown_arguments_are_an_error(capsys, words):
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2 and "fastdit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["import", "", "--format", "sit", "--out", "o"],
        ["import", "a.pt", "--format", "sit", "--out", ""],
        ["import-base", "a.pkl", "--params", "", "--out", "o"],
        ["encode", "", "--autoencoder", "a", "--out", "o"],
        ["encode", "i", "--autoencoder", "a", "--out", ""],
        ["export", "", "--out", "o.safetensors"],
    ],
)
def test_an_empty_path_is_not_the_current_folder(capsys, words):
    complains(capsys, words, "a path is ''")


@pytest.fixture
def command(monkeypatch):
    """Let `fastdit info` raise or return something else."""

    def set_outcome(outcome):
        def run(arguments):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, cli.COMMANDS["info"].module, module)

    return set_outcome


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad"), 2),
        (Stopped("bad"), 75),
        (Interrupted("bad"), 130),
        (FloatingPointError("bad"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(command, capsys, error, code):
    command(error)
    assert cli.main(["info"]) == code
    out, err = capsys.readouterr()
    assert not out and err.startswith("fastdit: ") and err.count("\n") == 1


def test_only_rank_0_speaks(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command("text")
    assert cli.main(["info"]) == 0
    command(InputError("bad"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("variable", "starts_again"), [(None, True), ("FASTDIT_NO_REEXEC", False), ("GLIBC_TUNABLES", False)])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no glibc")
def test_the_allocator_needs_a_restart(monkeypatch, variable, starts_again):
    started = []
    for name in ("GLIBC_TUNABLES", "FASTDIT_NO_REEXEC", *cli.CUDA_ENVIRONMENT):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    if variable:
        monkeypatch.setenv(variable, "1")
    cli._tune_environment()
    assert bool(started) is starts_again
    assert (os.environ.get("GLIBC_TUNABLES") == cli.ALLOCATOR) is starts_again
    assert os.environ.items() >= cli.CUDA_ENVIRONMENT.items()


def test_python_m_fastdit():
    done = subprocess.run([sys.executable, "-m", "fastdit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastdit {__version__}\n"


@pytest.mark.parametrize(
    ("words", "streams", "codes"),
    [
        (["plan", "--preset", "test/4"], ["stdout"], [141]),
        (["plan", "--preset", "test/4", "--json"], ["stdout"], [141]),
        (["--help"], ["stdout"], [0, 141]),  # argparse ignores errors of its own output
        (["train", "--help"], ["stdout"], [0, 141]),
        (["train", "--dry-run"], ["stdout"], [141]),
        (["train", "nonsense=1"], ["stdout", "stderr"], [141]),
        (["prepare", "DIR", "--out", "INDEX"], ["stderr"], [141]),  # a progress bar
    ],
)
def test_a_reader_that_has_gone_gets_no_traceback(tmp_path, words, streams, codes):
    """As in `fastdit plan | head -1`. The text fits a pipe's and Python's buffers: writing fails at the last flush."""
    (tmp_path / "d/a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "d/a/1.png")
    words = [{"DIR": str(tmp_path / "d"), "INDEX": str(tmp_path / "d.index")}.get(word, word) for word in words]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as gone:
        pipes = {name: gone if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
        done = subprocess.run([sys.executable, "-m", "fastdit", *words], **pipes, text=True, check=False)
    assert done.returncode in codes and not done.stderr, (done.returncode, done.stderr)


def test_streams_that_are_closed_or_full(tmp_path):
    """A closed one (`>&-`) is quiet, and no file takes its number; a full disk is a sentence."""
    command = f"{sys.executable} -m fastdit train --dry-run"
    for closed in ("", "<&- "):
        done = subprocess.run(f"{command} {closed}>&- 2>&-", shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "fastdit: stdout cannot be written: No space left on device: free some space\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_ctrl_c_is_one_true_line(monkeypatch, capsys, command):
    """Also while the command is imported, and on rank 0 only."""

    def interrupt(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == f"fastdit: interrupted; {cli.COMMANDS[command].interrupted}\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main([command]) == 130 and not capsys.readouterr().err


def test_a_rank_that_is_no_number_is_said(monkeypatch, capsys, command):
    command(InputError("RANK=x"))
    monkeypatch.setenv("RANK", "x")
    assert cli.main(["info"]) == 2 and "RANK=x" in capsys.readouterr().err
