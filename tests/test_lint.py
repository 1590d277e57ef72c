"""What would stall or corrupt a GPU and no CPU run would show: forbidden by name in the code that the hot loop runs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = [ROOT / "fastdit" / f"{name}.py" for name in ("flow", "model", "attention", "autoencoder", "graphs")]
# of the rooms that a training step or a sampling step runs through: what does not run in one
COLD = {
    "data/encode.py",  # writes what it computes, shard by shard
    "data/prepare.py",  # has no device
    "sampling/class_names.py",
    "training/init.py",  # runs once, before the first step
    "sampling/command.py",  # prints, and writes pictures
}
ROOMS = [file for room in ("data", "sampling", "training") for file in sorted((ROOT / "fastdit" / room).glob("*.py"))]
FILES = [
    *CORE,
    *(file for file in ROOMS if f"{file.parent.name}/{file.name}" not in COLD),
    *sorted((ROOT / "kernels").glob("*.py")),
]

METHODS = {"item", "cpu", "tolist", "numpy", "cuda", "synchronize"}  # read or move device data on the host's time
CALLS = {"torch.tensor", "torch.as_tensor", "torch.equal", "time.time", "float", "print", "triton.autotune", "triton.heuristics"}

NARROW = "tl.program_id without .to(tl.int64)"

# (file, function): what it may do, and why
ALLOWED = {
    ("loop.py", "_reduce_sums"): {"tolist"},  # once per log_steps
    ("loop.py", "_slowest_phases"): {"tolist", "torch.tensor"},  # once per log_steps
    ("loop.py", "_save"): {"item"},  # once per save_steps
    ("loop.py", "_train"): {"print"},  # a finished run says so and ends
    ("command.py", "run"): {"print"},  # what a resumed run keeps, before it begins
    ("optimizer.py", "__init__"): {"numpy"},  # the host's view of what a step copies to the host
    ("optimizer.py", "finish_step"): {"item", "synchronize"},  # that view, once the event of the last step has passed
    ("adamw.py", "_upload_addresses"): {"torch.tensor"},  # once, before the first step
    ("adamw.py", "upload"): {"torch.tensor", "tolist"},  # of the host's numbers, in pinned memory
    ("engine.py", "initialize"): {"cpu"},  # once, before the first step
    ("engine.py", "gradient_norm"): {"float"},  # once per log_steps
    ("telemetry.py", "write"): {"float", "time.time"},  # once per log_steps
    ("validation.py", "losses"): {"tolist"},  # once per validate.steps, at the end
    ("engine.py", "steps_applied"): {"item"},  # once per save_steps
    ("solvers.py", "dopri5"): {"item"},  # it reads its error at every step anyway
    ("sampler.py", "decode"): {"cpu", "numpy"},  # once per batch, after its last step
    ("sampler.py", "__init__"): {"float"},  # the decay in the name of the weights
    ("sampler.py", "latents"): {"torch.as_tensor"},  # the labels, once before the first batch
    ("autoencoder.py", "sha256"): {"cpu", "numpy"},  # once, before the first step
    ("loop.py", "_draw"): {"torch.tensor"},  # once per train.sample_steps
    ("validation.py", "_open_reference"): {"torch.tensor"},  # once, before the first step
    ("autoencoder.py", "_scale"): {"torch.tensor"},  # at construction
    ("order.py", "random_crops"): {"numpy"},  # on the host, in the threads that read ahead
    ("builtin.py", "__init__"): {"tolist"},  # of the host's labels, once
    ("latents.py", "__init__"): {"tolist"},
    ("loader.py", "__init__"): {"tolist"},
    ("index.py", "_check_files"): {"tolist"},  # when an index is opened
    ("loader.py", "_crops_of"): {"numpy"},
    ("latents.py", "_fill"): {"numpy"},
    ("model.py", "make_frequencies"): {"torch.tensor"},  # at construction
    ("qk_norm_rope.py", "qk_norm_rope_forward_kernel"): {NARROW},  # which of q and k: compared, never an offset
    ("qk_norm_rope.py", "qk_norm_rope_backward_kernel"): {NARROW},  # which of q, k and v
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source):
    """(function, offence, line) of every forbidden call in a module's source."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def function(node):
        while node in parents:
            node = parents[node]
            if isinstance(node, ast.FunctionDef):
                return node.name
        return ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "weight":
            yield function(node), "indexed weight", node.lineno  # its backward is atomic or sorts: use F.embedding
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield function(node), node.func.attr, node.lineno
        elif name in CALLS and not (name == "float" and isinstance(node.args[0], ast.Constant)):
            yield function(node), name, node.lineno
        elif name.startswith("tl.atomic"):
            yield function(node), name, node.lineno  # the order of the sum would differ from run to run
        elif name == "tl.program_id":
            outer = parents[node]
            if not (isinstance(outer, ast.Attribute) and outer.attr == "to"):
                yield function(node), NARROW, node.lineno  # offsets pass 2^31


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_hot_code_neither_waits_nor_races(file):
    found = [o for o in offences(file.read_text()) if o[1] not in ALLOWED.get((file.name, o[0]), ())]
    assert not found


def test_allowances_are_used_and_cold_files_exist():
    seen = {(file.name, function, offence) for file in FILES for function, offence, _ in offences(file.read_text())}
    assert not [(*place, offence) for place, allowed in ALLOWED.items() for offence in allowed if (*place, offence) not in seen]
    assert all((ROOT / "fastdit" / name).exists() for name in COLD)
    names = [file.name for file in FILES if file.name != "__init__.py"]
    assert len(names) == len(set(names))  # ALLOWED goes by name


def test_dalis_memory_becomes_torchs_in_one_place():
    """It is used again while DALI runs ahead: nobody else may take a batch from it."""
    users = [f.name for f in (ROOT / "fastdit").rglob("*.py") if "feed_ndarray" in (text := f.read_text()) or "dlpack" in text]
    assert users == ["loader.py"]


@pytest.mark.parametrize(
    "line",
    [
        "x.item()",
        "triton.autotune([])",
        "x.cpu()",
        "torch.tensor([1])",
        "float(x)",
        "table.weight[i]",
        "tl.atomic_add(p, x)",
        "i = tl.program_id(0)",
        "time.time()",
    ],
)
def test_the_lint_sees(line):
    assert len(list(offences(f"def f():\n    {line}\n"))) == 1


def test_the_lint_lets_pass():
    assert not list(
        offences("def f():\n    i = tl.program_id(0).to(tl.int64)\n    F.embedding(i, table.weight)\n    float('nan')\n")
    )
