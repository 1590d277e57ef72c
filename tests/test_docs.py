"""README.md, docs/ and the ready configs tell the truth: commands parse, links and files exist, numbers are those of the CSVs."""

import argparse
import ast
import csv
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdit import autoencoder, cli, data
from fastdit.config import RENAMED, Config, InputError, parse
from fastdit.distributed import World
from fastdit.evaluation import metrics
from fastdit.planning import cards, plan
from fastdit.sampling import solvers

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests/README.md"]
CONFIGS = sorted((ROOT / "launch/configs").glob("*.yaml"))
TOP = ("fastdit", "kernels", "csrc", "benchmarks", "launch", "tests", "docs")

MOVED = ("launch/quickstart.yaml",)  # files that CHANGELOG.md names although they are gone

# Start of a row of the README's table of measurements: the row of benchmarks/results/suites_xeon_amx.csv that it shows.
MEASURED = {
    "train step, S/2": dict(suite="train_step", case="S/2", provider="engine", size="batch 4", precision="bf16"),
    "training S/2 with SD-VAE": dict(
        suite="end_to_end", case="S/2 and SD-VAE", provider="from latents", size="batch 2", precision="bf16"
    ),
    "sampling, S/2": dict(suite="sampling", case="S/2", provider="fastdit bf16", size="batch 4", precision="bf16"),
}
IN_FP32 = "the first three rows are {} x, {} x and {} x"  # of the same rows in suites_zen4_avx2.csv

# The documented parameters of the base model's script: each needs a key of ours.
BASE_PARAMETERS = """
    totalSteps batchSize inCh num_classes patch_size num_blocks dim c_dim hidden_scale num_heads device wandb_name log_steps
    p_uncond lr use_lr_scheduler ema_update_freq ema_decay warmup_steps positional_encoding numSaveSteps saveDir loadModel
"""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of the command line with the arguments of a command."""
    return cli.make_parser(command)


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Return the shell commands of a page as words, without comments and leading NAME=value."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    for words in found:
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
    return [words for words in found if words]


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the arguments that fastdit gets from a command, None if the command does not run fastdit."""
    if words[0] == "fastdit":
        return words[1:]
    for i, word in enumerate(words):
        if word in ("-m", "--module") and words[i + 1] == "fastdit.cli":
            return words[i + 2 :]
        if word in ("launch/train.sh", "launch/slurm.sbatch"):
            rest = words[i + 1 :]
            return ["train", *(rest[2:] if rest[0] == "--restarts" else rest)]
    return None


def check_fastdit(words: list[str]) -> None:
    """Parse a command as fastdit does; read the config that it names and apply its overrides."""
    try:
        arguments, rest = parser(words[0]).parse_known_args(words)
    except SystemExit:
        raise AssertionError(f"not understood: {words}") from None
    settings = [*getattr(arguments, "settings", []), *rest]
    files = [word for word in settings if "=" not in word]
    assert len(files) <= 1 and not any(word.startswith("-") for word in rest), f"not understood: {rest}"
    assert "settings" in arguments or not rest, f"not understood: {rest}"
    if "settings" in arguments:
        parse(ROOT / files[0] if files else None, [word for word in settings if "=" in word])


def check_benchmark(words: list[str]) -> None:
    """Check that a `python -m benchmarks.NAME` command has a module with the options that it uses."""
    module, options = words[words.index("-m") + 1], [word for word in words if word.startswith("--")]
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and all(option in done.stdout for option in options), done.stdout + done.stderr


def missing_files(words: list[str]) -> list[str]:
    """Return the files of the repository that a command names and that do not exist."""
    named = [word for word in words if word.partition("/")[0] in TOP and "/" in word and "=" not in word]
    return [word for word in named if not (ROOT / word).exists()]


def check(words: list[str]) -> None:
    assert not missing_files(words)
    arguments = arguments_of(words)
    if arguments is not None:
        check_fastdit(arguments)
    elif "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
        check_benchmark(words)


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_commands(page):
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "fastdit train launch/configs/none.yaml",
        "fastdit train launch/configs/quickstart.yaml model.dept=8",
        "fastdit sample --chekpoint runs/mine",
        "torchrun --nproc_per_node 8 -m fastdit.cli encode imagenet.index",
        "deepspeed --num_gpus 8 --module fastdit.cli tran launch/configs/quickstart.yaml",
        "sbatch --nodes 4 launch/slurm.sbatch launch/configs/quickstart.yaml train.lr=fast",
        "launch/nothing.sh --restarts 3 launch/configs/quickstart.yaml",
        "python -m benchmarks.nothing",
    ],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises((AssertionError, InputError)):
        check(shlex.split(line))


def test_the_pages_hold_commands_of_every_kind():
    found = [words for page in PAGES for words in commands(page)]
    assert len([words for words in found if arguments_of(words)]) > 30
    assert {"torchrun", "deepspeed", "sbatch", "fastdit", "launch/train.sh"} <= {words[0] for words in found}


def links(page: Path) -> list[str]:
    """Return the relative link targets of a page, pictures too."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return not file.exists() or bool(anchor and anchor not in anchors(file))


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links(page):
    assert [target for target in links(page) if broken(page, target)] == []


def test_a_broken_link_is_seen():
    assert broken(README, "docs/nothing.md") and broken(README, "#nothing") and broken(README, "docs/data.md#nothing")
    assert not broken(README, "docs/data.md#settings")


def named_files(page: Path) -> list[str]:
    """Return the files of the repository that a page names in backticks; names with <placeholders> are left out."""
    return re.findall(rf"`((?:{'|'.join(TOP)})/[\w./]*)`", page.read_text())


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_named_files(page):
    assert [file for file in named_files(page) if not (ROOT / file).exists() and file not in MOVED] == []


def test_the_test_map_names_every_helper():
    named = {file for row in table(ROOT / "tests/README.md", "file in") for file in re.findall(r"`(\w+\.py)`", row[0])}
    assert named == {file.name for file in (ROOT / "tests/support").glob("*.py")}


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def result(file: str, **row: str) -> dict[str, str]:
    """Return the one row of a CSV of benchmarks/results with these values."""
    with (ROOT / "benchmarks/results" / file).open() as lines:
        (found,) = [each for each in csv.DictReader(lines) if row.items() <= each.items()]
    return found


def table(page: Path, head: str) -> list[list[str]]:
    """Return the cells of the rows of the table whose head begins with `head`."""
    text = page.read_text().partition(f"\n| {head}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in text.splitlines()[2:]]


def wrong_rows(rows: list[list[str]]) -> list[list[str]]:
    """Return the rows of the README's table that are not what the CSV says or what a test shows."""
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    wrong = []
    for row in rows:
        label, value, where = row
        measured = next((found for start, found in MEASURED.items() if label.startswith(start)), None)
        if measured is None:
            test = re.search(r"`(test_\w+)`", where)
            right = test is not None and f"def {test[1]}(" in tests and not re.search(r"\d", value)
        else:
            csv_row = result("suites_xeon_amx.csv", **measured)
            right = value == f"{float(csv_row['speedup']):.2f} x as fast"
            right &= all(csv_row[key] in label for key in ("size", "precision"))
            right &= where.endswith(f"Xeon with AMX, {csv_row['threads']} threads, {csv_row['commit']}")
        if not right:
            wrong.append(row)
    return wrong


def test_measured_numbers():
    rows = table(README, "measured |")
    assert len(rows) == 4 and not wrong_rows(rows)
    fp32 = [
        result("suites_zen4_avx2.csv", **{**row, "precision": "fp32", "provider": row["provider"].replace("bf16", "fp32")})
        for row in MEASURED.values()
    ]
    assert IN_FP32.format(*(f"{float(row['speedup']):.2f}" for row in fp32)) in " ".join(README.read_text().split())


def test_a_wrong_number_is_seen():
    rows = table(README, "measured |")
    for i, (label, value, where) in enumerate(rows):
        assert wrong_rows([[label, value.replace("x as fast", "x faster").replace("to the last bit", "to 1e-3"), where]]), i
        assert wrong_rows([[label, value, where.replace(",", ";").replace("ten", "two")]]), i


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_configs_parse_and_say_what_they_are(file):
    config, head = parse(file), file.read_text().partition("\nmodel:")[0]
    assert "# Command: " in head and "# Hardware: " in head and f"launch/configs/{file.name}" in head
    assert config.train.name == file.stem


@pytest.mark.parametrize("file", [file for file in CONFIGS if file.stem.startswith("imagenet256")], ids=name)
def test_configs_show_what_plan_predicts(file):
    made = plan.make(plan.settings(str(file), []), cards.find_card("h100"), 8, 80, 1_281_167, None)
    head = " ".join(file.read_text().replace("\n# ", " ").split())
    speed, hours, mfu = (sorted(values.values()) for values in (made["images_per_s"], made["run"]["hours"], made["mfu"]))
    assert f"{speed[0]:,.0f} to {speed[-1]:,.0f} images/s (MFU {mfu[0]:.0%} to {mfu[-1]:.0%}), " in head
    peak = made["memory"]["stages"][made["memory"]["stage"]]["peak"] / 1e9
    assert f"{hours[0]:.1f} to {hours[-1]:.1f} hours, {peak:.1f} GB per GPU" in head and "Predicted, not measured" in head


def test_the_quickstart_differs_from_the_defaults_by_its_recipe_only():
    quickstart, defaults = (parse(file).to_dict() for file in (ROOT / "launch/configs/quickstart.yaml", None))
    differ = {f"{section}.{key}" for section, keys in defaults.items() for key in keys if quickstart[section][key] != keys[key]}
    assert differ == {
        "model.patch_size", "model.class_std", "flow.prediction", "train.name", "train.total_steps", "train.decay_steps",
        "train.save_steps", "train.sample_steps", "validate.steps", "sample.solver", "sample.steps", "zero.stage",
    }  # fmt: skip


def test_code_names_configs_and_pages_that_exist():
    code = [file for top in ("fastdit", "kernels", "csrc", "benchmarks", "launch") for file in (ROOT / top).rglob("*.*")]
    texts = {file: file.read_text() for file in code if file.suffix in (".py", ".cpp", ".h", ".sh", ".yaml", ".sbatch", ".md")}
    named = [(name(file), path) for file in texts for path in re.findall(r"\b(?:launch|docs)/[\w/]+\.\w+", texts[file])]
    assert len(named) > 10 and [(file, path) for file, path in named if not (ROOT / path).exists()] == []


def test_every_documented_parameter_of_the_base_script_has_a_key():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.+) \|$", (ROOT / "docs/coming-from-the-base-script.md").read_text(), re.M))
    config = Config().to_dict()
    for parameter in BASE_PARAMETERS.split():
        keys = re.findall(r"`(model|data|flow|train|sample|zero)\.(\w+)", rows[parameter])
        assert keys and all(key in config[section] for section, key in keys), parameter


def settings_without_a_key(page: Path) -> list[str]:
    """Return the `section.key` settings that a page names and no config has."""
    config = Config().to_dict()
    named = re.findall(rf"`({'|'.join(config)})\.([a-z_0-9]+)[`=]", page.read_text())
    unknown = [f"{section}.{key}" for section, key in named if key not in config[section] and key != "sh"]  # train.sh is a script
    return [setting for setting in unknown if setting not in RENAMED]


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_settings_in_prose(page):
    assert settings_without_a_key(page) == []


def test_every_solver_and_metric_has_its_row():
    calls = {row[0].strip("`"): row[2] for row in table(ROOT / "docs/sampling.md", "`--solver`")}
    assert calls == {key: str(solver.calls or "as many as it needs") for key, solver in solvers.SOLVERS.items()}
    named = {key for row in table(ROOT / "docs/evaluation.md", "metric") for key in re.findall(r"`(\w+)`", row[0])}
    assert named == set(metrics.METRICS)


def check_imports(code: str) -> None:
    """Parse Python code; check that what it imports by `from … import …` exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_import_what_exists(page):
    for block in blocks(page, "python"):
        check_imports(block)


def test_the_picture_names_files_that_exist():
    text = (ROOT / "docs/architecture.svg").read_text()
    groups = re.findall(r'<g [^>]*data-folder="([^"]+)">(.*?)</g>', text, re.S)
    files = [f"{folder}/{file}" for folder, group in groups for file in re.findall(r"\b\w+\.py\b", group)]
    assert len(files) > 20 and len(files) == len(re.findall(r"\b\w+\.py\b", text))
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_notebook_names_what_exists():
    cells = json.loads((ROOT / "launch/sample_loop.ipynb").read_text())["cells"]
    code, prose = ("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind) for kind in ("code", "markdown"))
    check_imports(code)
    assert [solver for solver in solvers.SOLVERS if solver not in prose] == []
    assert not [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not (ROOT / "launch" / target).exists()]


def example(heading: str, module: str) -> dict:
    """Run the example of a section of docs/extending.md in a copy of the names of a module, and return it."""
    section = (ROOT / "docs/extending.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    names = dict(vars(importlib.import_module(module)))
    exec(f"from __future__ import annotations\n{code}", names)  # modules import some types only for type checkers
    return names


def members(protocol: type) -> set[str]:
    return {*protocol.__annotations__, *(key for key in vars(protocol) if not key.startswith("_"))}


def test_the_example_of_an_op():
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    found = example("A fused op", "fastdit.kernels.modulate")["scale_shift_reference"](x, scale, shift)
    torch.testing.assert_close(found, x * (1 + scale[:, None]) + shift[:, None])


def test_the_example_of_a_solver(monkeypatch):
    monkeypatch.setattr(solvers, "SOLVERS", {})  # the name of the example may be taken by now
    midpoint = example("A solver", "fastdit.sampling.solvers")["midpoint"]
    *_, x = midpoint(lambda x, t, at: t * x, torch.ones(1, 1, 2, 2), 64)  # dx/dt = t·x: second order ends within 1e-4
    torch.testing.assert_close(x, torch.full((1, 1, 2, 2), math.exp(-0.5)), atol=1e-4, rtol=0)


def test_the_example_of_a_loader():
    made = example("A data format", "fastdit.data.builtin")["TensorLoader"]
    config = parse(None, ["train.batch_size=4"])
    loader = made(torch.randn(16, 1, 32, 32), torch.arange(16) % 10, config, World(0, 1, torch.device("cpu"), None))
    images, labels = loader.batch(1, 0)
    assert (images.shape, labels.shape) == ((4, 1, 32, 32), (4,))
    assert [member for member in members(data.Loader) if not hasattr(loader, member)] == []


def test_the_example_of_an_autoencoder():
    codec = example("An autoencoder", "fastdit.autoencoder")["HalfResolution"](3, 16)
    moments = codec.encode(torch.rand(2, 3, 16, 16))
    assert moments.shape == (2, codec.channels, codec.size, codec.size)
    assert codec.decode(codec.posterior_sample(moments, None)).shape == (2, codec.image_channels, 16, 16)
    assert [member for member in members(autoencoder.Codec) if not hasattr(codec, member)] == []


def test_the_example_of_a_metric(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    example("A metric", "fastdit.evaluation.metrics")
    zero, one = (metrics.Summary(torch.full((4,), value), torch.eye(4)) for value in (0.0, 1.0))
    assert metrics.compare(zero, one, torch.device("cpu"))["mean_distance"] == 4
