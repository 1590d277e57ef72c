"""Imports point down only: leaves, then the core, then the rooms, then the command line.

`python tests/test_imports.py` draws docs/modules.svg.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "fastdit"
# From the bottom up; a room stands for all of its files. A file may import from its own level and from those before it.
LEVELS = [
    ["sampling.solvers"],  # the registry that config checks names against; it imports nothing of fastdit
    ["yaml12"],  # how YAML is read; it imports nothing of fastdit
    ["checks", "presets"],
    ["config"],
    ["files", "distributed", "device", "progress", "hub", "autoencoder_files"],
    ["attention", "model", "flow", "autoencoder", "graphs", "flops"],
    ["checkpoint"],
    ["convert"],
    ["data"],
    ["sampling"],
    ["evaluation"],
    ["planning.cards"],  # a table of datasheets, which the training log reads too
    ["training"],
    ["planning"],
    ["cli"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}


def level(module):
    return LEVEL[module] if module in LEVEL else LEVEL[module.split(".")[0]]


def imports(file):
    """Modules of fastdit that a file imports, at the top or inside functions; what only type checkers see is left out."""
    tree = ast.parse(file.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastdit" and id(node) not in hidden:
            base = node.module.removeprefix("fastdit").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                name = next((n for n in (inner, f"{inner}.__init__", base, f"{base}.__init__") if n in MODULES), "")
                if name:
                    yield name.removesuffix(".__init__")


GRAPH = {
    name.removesuffix(".__init__"): set(imports(file)) - {name}
    for name, file in MODULES.items()
    if name not in ("__init__", "__main__")
}


def test_every_module_has_a_level():
    assert [module for module in GRAPH if module not in LEVEL and module.split(".")[0] not in LEVEL] == []


def test_imports_point_down():
    upward = [(a, b) for a, seen in GRAPH.items() for b in seen if level(b) > level(a)]
    assert not upward


def test_there_is_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_kernels_know_nothing_of_the_trainer():
    for file in sorted((ROOT.parent / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdit"):
                assert node.module.startswith("fastdit.kernels") or [a.name for a in node.names] == ["kernels"], file.name


def loaded(code):
    """The modules that a new process has after `code`."""
    command = [sys.executable, "-c", f"import sys; {code}; print('\\n'.join(sys.modules))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_an_index_is_made_without_the_model():
    modules = loaded("from fastdit import cli; cli.make_parser('prepare')")
    assert not modules & {"torch", "triton", "deepspeed", "diffusers", "fastdit.model", "fastdit.kernels"}


def test_help_is_printed_without_torch():
    modules = loaded("from fastdit import cli; cli.make_parser(); cli.make_parser('train')")
    assert not modules & {"torch", "triton", "deepspeed", "diffusers"}


def test_sampling_needs_no_deepspeed():
    modules = loaded("from fastdit.sampling.sampler import Sampler")
    assert not modules & {"deepspeed", "diffusers", "torch._dynamo"}


def draw(path):
    """Write the picture of the levels: an arrow from each room or flat file to what it imports; one that points up would be red."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "modules"  # the same file each time

    room = lambda module: module if module in LEVEL else module.split(".")[0]
    columns = max(map(len, LEVELS))
    aside = lambda names, y: 0.8 * (-1) ** y if len(names) == 1 else 0  # arrows along a column would hide each other
    place = {
        name: ((i + 0.5) * columns / len(names) + aside(names, y), y)
        for y, names in enumerate(LEVELS)
        for i, name in enumerate(names)
    }
    figure = Figure(figsize=(11, 12), layout="constrained")
    axes = figure.subplots()
    for a, b in sorted({(room(a), room(b)) for a, seen in GRAPH.items() for b in seen if room(a) != room(b)}):
        upward = place[b][1] > place[a][1]
        bend = f"arc3,rad={0.15 if place[a][1] == place[b][1] else 0}"
        arrow = dict(arrowstyle="-|>", color="red" if upward else "0.65", connectionstyle=bend, shrinkA=14, shrinkB=14)
        axes.annotate("", place[b], place[a], arrowprops=arrow)
    for name, point in place.items():
        label = f"{name}/" if (ROOT / name).is_dir() else name
        axes.annotate(label, point, ha="center", va="center", bbox=dict(boxstyle="round", facecolor="white", edgecolor="0.3"))
    axes.set(xlim=(0, columns), ylim=(-0.5, len(LEVELS) - 0.5))
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT.parent / "docs" / "modules.svg")
