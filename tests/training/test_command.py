"""`fastdit train`: its settings, and what a resumed run keeps of them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from commands import complains, environment, lines_of, settings, snapshot, trained_run
from fastdit import checkpoint, cli
from fastdit.config import InputError, parse, read_settings
from fastdit.training.command import settings_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with settings that are not the defaults."""
    return trained_run(tmp_path_factory.mktemp("runs"), "flow.label_dropout=0.2", "train.clip=2")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "r")


def test_dry_run_prints_a_config_that_reads_back(tmp_path, capsys):
    first, *others = settings(tmp_path)
    assert cli.main(["train", first, "--dry-run", *others]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(tmp_path / "c.yaml") == parse(None, settings(tmp_path))
    assert not (tmp_path / "r").exists()


def config_of(run):
    """The settings of the newest checkpoint, in the folder where the run lies now."""
    config = checkpoint.find(run).config
    return replace(config, train=replace(config.train, out=str(run.parent)))


def events_of(run):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "changed" in line]


def test_the_same_command_changes_nothing(run, tmp_path, capsys):
    words = settings(tmp_path, "train.total_steps=4", "train.keep_checkpoints=1", "flow.label_dropout=0.2", "train.clip=2")
    assert settings_of(read_settings(None, words)) == (config_of(run), None)
    assert cli.main(["train", *words]) == 0
    out, err = capsys.readouterr()
    assert "already trained" in out and "->" not in err and "kept" not in err and not events_of(run)


def test_a_run_without_its_command_keeps_its_settings(run, tmp_path, capsys):
    """Only the name is given: every other setting is the checkpoint's, and what is not the default is named."""
    before = config_of(run)
    config, kept = settings_of(read_settings(None, [f"train.out={tmp_path}", "train.name=r"]))
    assert config == before
    for text in ("train.lr=0.001", "flow.label_dropout=0.2", "train.clip=2.0", "model.width=64", "step_00000004"):
        assert text in kept
    assert "train.out" not in kept and "train.seed" not in kept
    assert cli.main(["train", f"train.out={tmp_path}", "train.name=r"]) == 0
    out, err = capsys.readouterr()
    assert "already trained to step 4" in out and f"fastdit: {kept}\n" in err


def test_settings_of_a_damaged_checkpoint_are_not_kept(run, tmp_path):
    """config.json of the newest checkpoint has the right size, but another learning rate."""
    older = shutil.copytree(checkpoint.find(run).path, run / "checkpoints" / "step_00000002")
    config = config_of(run)
    newest = checkpoint.find(run).path / "config.json"
    newest.write_text(newest.read_text().replace('"clip": 2.0', '"clip": 9.0'))
    resumed, kept = settings_of(read_settings(None, [f"train.out={tmp_path}", "train.name=r"]))
    assert resumed == config and f"kept from {older}:" in kept


def test_a_run_goes_on_without_label_dropout(run, tmp_path):
    """Its guidance was not asked for now: it goes too, unless it is given."""
    words = [f"train.out={tmp_path}", "train.name=r", "flow.label_dropout=0"]
    assert settings_of(read_settings(None, words))[0].sample.guidance == 0
    with pytest.raises(InputError, match=r"sample.guidance=2.0 needs the null class"):
        settings_of(read_settings(None, [*words, "sample.guidance=2"]))


def test_changed_values_are_named_and_logged(run, tmp_path, capsys):
    words = [f"train.out={tmp_path}", "train.name=r", "train.total_steps=8", "train.clip=1", "train.schedule=cosine"]
    assert cli.main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert "train.clip 2.0 -> 1.0 (given now)" in said and "train.total_steps 4 -> 8 (given now)" in said
    assert "train.schedule" not in said.split("given now")[1]  # given again, and the same
    assert "learning rate of step 5: 0 -> 0.0006113; this is another schedule" in said
    (event,) = events_of(run)
    assert event["step"] == 5 and event["changed"] == {"train.clip": [2.0, 1.0], "train.total_steps": [4, 8]}
    assert event["lr_before"] == 0 and event["lr"] == pytest.approx(6.113e-4, rel=1e-3)
    assert list(lines_of(run)) == [2, 4, 6, 8] and lines_of(run)[6]["lr"] > 0
    assert config_of(run).flow.label_dropout == 0.2 and config_of(run).train.clip == 1
    assert cli.main(["train", f"train.out={tmp_path}", "train.name=r"]) == 0  # and these are its settings from now on
    assert config_of(run).train.total_steps == 8 and "->" not in capsys.readouterr().err


def test_an_event_is_not_doubled_by_a_run_that_is_killed(run, tmp_path):
    """It is resumed from the same checkpoint again."""
    shutil.copytree(run / "checkpoints", tmp_path / "kept")
    for _ in range(2):
        assert cli.main(["train", f"train.out={tmp_path}", "train.name=r", "train.total_steps=6", "train.sample_steps=0"]) == 0
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(tmp_path / "kept", run / "checkpoints")
    assert len(events_of(run)) == 1


def test_a_file_that_is_given_again_agrees(run, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    words = settings(tmp_path, "train.total_steps=4", "train.keep_checkpoints=1", "flow.label_dropout=0.2", "train.clip=2")
    sections = {}
    for section, _, setting in (word.partition(".") for word in words):
        sections.setdefault(section, {}).update([setting.split("=")])
    file.write_text(
        "\n".join(f"{name}:\n" + "\n".join(f"  {key}: {value}" for key, value in each.items()) for name, each in sections.items())
    )
    assert cli.main(["train", str(file)]) == 0 and "->" not in capsys.readouterr().err
    file.write_text(file.read_text().replace("clip: 2", "clip: 3"))
    assert cli.main(["train", str(file), "train.total_steps=6", "train.sample_steps=0"]) == 0
    assert "train.clip 2.0 -> 3.0 (given now)" in capsys.readouterr().err


def test_keys_that_may_not_change_are_refused(run, tmp_path, capsys):
    before = snapshot(run)
    words = [f"train.out={tmp_path}", "train.name=r", "train.total_steps=8"]
    for change, said in (("model.preset=S/2", "model.width=64, not with model.width=384"), ("train.seed=3", "train.seed=0"),
                         ("data.flip=true", "data.flip=False"), ("train.batch_size=8", "4 images per step")):  # fmt: skip
        complains(capsys, ["train", *words, change], said)
    assert snapshot(run) == before


def test_what_belongs_to_one_start_is_not_kept(tmp_path):
    """A run may be moved to another folder, and --resume never of its first start does not keep it from going on."""
    run = trained_run(tmp_path, "train.resume=never")
    (tmp_path / "new").mkdir()
    run.rename(tmp_path / "new/moved")
    config, _ = settings_of(read_settings(None, [f"train.out={tmp_path / 'new'}", "train.name=moved"]))
    assert (config.train.out, config.train.name, config.train.resume) == (str(tmp_path / "new"), "moved", "auto")


def test_a_dry_run_shows_the_settings_of_the_checkpoint_without_torch(run, tmp_path):
    code = "import sys; from fastdit import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "train", f"train.out={tmp_path}", "train.name=r", "train.lr=0.5", "--dry-run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.5\n" in done.stdout and "label_dropout: 0.2\n" in done.stdout and "kept from" in done.stderr


def pictures(folder, *classes):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (40, 48), (40 * i, 20 * k, 90)).save(folder / name / f"{k}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A run of two steps on a folder of pictures beside it, classes a and b."""
    folder = tmp_path_factory.mktemp("colours")
    pictures(folder / "d", "a", "b")
    words = [
        "model.in_channels=3",
        "model.num_classes=2",
        f"data.source={folder / 'd'}",
        "train.sample_steps=0",
        "train.total_steps=2",
    ]
    assert cli.main(["train", *settings(folder, *words)]) == 0
    return folder


@pytest.mark.parametrize("kind", ["relative", "moved", "spelled"])
def test_the_same_data_elsewhere_are_the_same_data(colours, tmp_path, monkeypatch, capsys, kind):
    shutil.copytree(colours, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    if kind == "moved":
        shutil.move("d", "other")
        shutil.rmtree("d.index")
    source = {"relative": "d", "moved": str(tmp_path / "x/other"), "spelled": f"{tmp_path}/x//d/../d/"}[kind]
    words = [f"train.out={tmp_path / 'x'}", "train.name=r", "train.total_steps=4", f"data.source={source}"]
    assert cli.main(["train", *words]) == 0
    assert f"data.source {colours / 'd'} -> {source} (given now)" in capsys.readouterr().err
    assert checkpoint.find(tmp_path / "x/r").state.step == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "b").rename(d / "Z"), ["class 0 was 'a' and is 'Z'", "train.init"]),
        (lambda d: (d / "a").rename(d / "c"), ["class 0 was 'a' and is 'b'"]),
        (
            lambda d: Image.new("RGB", (40, 48), "red").save(d / "a/new.png"),
            ["other images or labels", "restore them", "train.init"],
        ),
        (lambda d: (d / "a/0.png").rename(d / "b/9.png"), ["other images or labels"]),
    ],
)
def test_other_data_are_refused_with_what_to_do(colours, tmp_path, capsys, change, words):
    shutil.copytree(colours, tmp_path / "x")
    change(tmp_path / "x/d")
    shutil.rmtree(tmp_path / "x/d.index")
    before = snapshot(tmp_path / "x/r")
    settings_ = [f"train.out={tmp_path / 'x'}", "train.name=r", "train.total_steps=4", f"data.source={tmp_path / 'x/d'}"]
    complains(capsys, ["train", *settings_], *words)
    assert snapshot(tmp_path / "x/r") == before


def test_the_header_begins_with_the_class_table(colours, tmp_path, capsys):
    shutil.copytree(colours / "r", tmp_path / "r")
    assert cli.main(["train", f"train.out={tmp_path}", "train.name=r", "train.total_steps=3"]) == 0
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line.split() for line in said if line.strip() and "step/s]" not in line]
    at = next(i for i, line in enumerate(lines) if line == ["id", "class", "images"])
    assert lines[at + 1 : at + 3] == [["0", "a", "4"], ["1", "b", "4"]] and "fastdit" in lines[at + 3], lines


@pytest.mark.parametrize("words", [["model.width=65536", "model.depth=1000", "model.heads=512", "model.hidden=1024"],
                                   ["model.num_classes=1000000", "model.class_width=65536"]])  # fmt: skip
def test_a_model_larger_than_the_memory_is_one_sentence(tmp_path, capsys, words):
    complains(capsys, ["train", *settings(tmp_path, *words)], "billion parameters", "GB in fp32", "lower them")
