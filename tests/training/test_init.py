"""A run that begins from existing weights: what it takes, adapts and begins anew, and every kind of source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from commands import complains, lines_of, settings, snapshot, trained_run
from fastdit import checkpoint, cli, files, hub
from fastdit.config import InputError, from_dict, parse
from fastdit.convert import base
from fastdit.data import imagenet
from fastdit.model import DiT, rope_tables
from fastdit.training import init
from fastdit.training.loop import train
from runs import make_run

FIXTURES = Path(__file__).parent.parent / "fixtures"
CPU = torch.device("cpu")
NEW = "; new, near the mean of the old rows: "
WORDS = ["train.sample_steps=0", "train.log_steps=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps on the digits, which validates."""
    return trained_run(tmp_path_factory.mktemp("runs"), "validate.steps=2", "validate.images=16", "train.ema_more=[0.5]")


def source_of(theirs: dict, names=None, **ours) -> tuple[init.Source, DiT]:
    """Return a source with random weights, in memory, and a new model of the run that begins from it."""
    torch.manual_seed(1)
    model = DiT(from_dict({"model": {"preset": "test/4", "zero_init_gates": False, **theirs}}).model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = from_dict({"model": {"preset": "test/4", **theirs}})

    class InMemory(init.Source):
        def load(self):
            return dict(weights)

    record = {"path": "runs/source", "sha256": "0" * 64, "step": 9, "weights": "ema"}
    torch.manual_seed(2)
    return InMemory(Path("runs/source"), config, names, None, record), DiT(from_dict({"model": {"preset": "test/4", **ours}}).model)


def test_the_first_validation_is_the_sources(trained, tmp_path, capsys):
    """And the run resumes: its own checkpoint comes first, the source is not read again, and the record stays."""
    words = [f"train.init={trained}", "validate.steps=2", "validate.images=16", "train.save_steps=1", "train.total_steps=3"]
    run = train(parse(None, settings(tmp_path, *WORDS, *words)))
    assert lines_of(run)[0]["val_loss"] == lines_of(trained)[4]["val_loss"]  # to the last bit, on a CPU
    opened = checkpoint.find(trained)
    printed = capsys.readouterr().err
    assert f"begins from {trained}: ema weights of step 4, SHA-256 {opened.sha256()[:12]}" in printed
    assert "10 of 10 rows by class name, and the null row" in printed
    record = json.loads((run / "config.json").read_text())["init"]
    assert {key: record[key] for key in ("path", "step", "weights")} == {"path": str(trained), "step": 4, "weights": "ema"}
    assert record["sha256"] == opened.sha256() and [change["kind"] for change in record["changes"]] == ["taken", "taken"]
    moved = trained.rename(trained.with_name("moved"))
    try:
        assert cli.main(["train", *settings(tmp_path, *WORDS, *words, "train.total_steps=4", "validate.steps=0")]) == 0
    finally:
        moved.rename(trained)
    assert list(lines_of(run)) == [0, 1, 2, 3, 4] and checkpoint.find(run).state.init == record
    out = tmp_path / "model.safetensors"
    checkpoint.export(run, "ema", out)
    assert json.loads(out.with_suffix(".json").read_text())["state"]["init"] == record
    assert checkpoint.load_json(run / "config.json") == checkpoint.find(run).config == parse(run / "config.json")
    assert cli.main(["train", *settings(tmp_path, *WORDS, f"train.init={trained}/", "train.total_steps=4")]) == 0  # the same path
    before = snapshot(run)
    other = ["train.init=elsewhere", "train.total_steps=9"]
    complains(
        capsys, ["train", *settings(tmp_path, *WORDS, *other)], "began from", str(trained), "train.init=elsewhere", "train.name"
    )
    assert snapshot(run) == before


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again(trained, tmp_path):
    words = [f"train.init={trained}", "validate.steps=4", "validate.images=16", "train.total_steps=1"]
    run = train(parse(None, settings(tmp_path, *WORDS, *words)))
    shutil.rmtree(run / "checkpoints/step_00000001")
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    train(parse(None, settings(tmp_path, *WORDS, *words)))
    assert lines == [0, 1, 1] == [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_from_weights_is_continued_bit_by_bit(trained, tmp_path, precision):
    words = [f"train.init={trained}", "model.num_classes=12", f"train.precision={precision}", "train.schedule=constant"]
    results = []
    for name, totals in (("uninterrupted", [4]), ("resumed", [1, 3, 4])):
        for total in totals:
            run = train(parse(None, settings(tmp_path, *WORDS, *words, f"train.name={name}", f"train.total_steps={total}")))
        weights = (run / "checkpoints/step_00000004/weights_rank_0000.safetensors").read_bytes()
        results.append(({step: line["loss"] for step, line in lines_of(run).items()}, weights))
    assert results[0] == results[1]


def test_a_run_begins_like_any_other(trained, tmp_path):
    """Step 0, a fresh optimizer, and an EMA and further averages at the source's weights."""
    run = train(
        parse(
            None, settings(tmp_path, *WORDS, f"train.init={trained}", "train.total_steps=1", "train.lr=0", "train.ema_more=[0.9]")
        )
    )
    opened = checkpoint.find(run)
    assert (opened.state.step, opened.state.optimizer_steps, opened.state.images_seen, opened.state.origin) == (1, 1, 4, None)
    wanted = dict(checkpoint.find(trained).load_model("ema", CPU).named_parameters())
    for kind in ("raw", "ema", "ema_0.9"):
        assert all(torch.equal(p, wanted[name]) for name, p in opened.load_model(kind, CPU).named_parameters()), kind


@pytest.mark.parametrize("kind", ["checkpoint", "exported", "folder of an export", "import", "raw", "ema_0.5", "hub"])
def test_every_kind_of_source(trained, tmp_path, kind, monkeypatch):
    opened, weights, path = checkpoint.find(trained), "ema", trained
    if kind == "checkpoint":
        path = opened.path
    elif kind in ("exported", "folder of an export", "hub"):
        path = tmp_path / "model.safetensors"
        checkpoint.export(trained, "ema", path)
        path = path if kind == "exported" else tmp_path
    elif kind == "import":
        path = make_run(tmp_path / "imported")
        opened = checkpoint.find(path)
    elif kind in ("raw", "ema_0.5"):
        weights = kind
    text = str(path)
    if kind == "hub":  # the layout of the cache, without a network
        monkeypatch.chdir(tmp_path)
        cache, text = tmp_path / "cache", "someone/digits@v1"
        snapshot_folder = cache / "models--someone--digits/snapshots/abc"
        snapshot_folder.mkdir(parents=True)
        for file in tmp_path.glob("model.*"):
            file.rename(snapshot_folder / file.name)
        (cache / "models--someone--digits/refs").mkdir()
        (cache / "models--someone--digits/refs/v1").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)  # not asked
    source = init.open_source(parse(None, settings(tmp_path, f"train.init={text}", f"train.init_weights={weights}")))
    wanted = dict(opened.load_model(weights, CPU).named_parameters())
    loaded = source.load()
    assert set(loaded) == set(wanted) and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert (source.record["path"], source.record["weights"], source.record["step"]) == (text, weights, opened.state.step)


def test_the_base_models_pickle_as_source(tmp_path):
    file = FIXTURES / "base_rope/model_10s.pkl"
    theirs, weights, step, _ = base.load_run(file, None)
    model = {key: value for key, value in theirs.to_dict()["model"].items() if key != "num_classes"}
    config = from_dict({"model": {**model, "num_classes": 3}, "train": {"init": str(file)}})
    source = init.open_source(config)
    assert source.record == {"path": str(file), "sha256": files.sha256(file), "step": step, "weights": "ema"}
    torch.manual_seed(0)
    model = DiT(config.model)
    fresh = model.class_embedding.table.weight.detach().clone()
    changes = init.adapt(model, source, ["a", "b", "c"], "v")
    table = weights["class_embedding.table.weight"]
    assert torch.equal(model.class_embedding.table.weight[:3], table[:-1].mean(0) + fresh[:3])
    assert torch.equal(model.class_embedding.table.weight[3], table[-1])
    assert "0 of 3 rows (classes cannot be told apart" in changes[1].text and changes[1].text.endswith("rows: a, b, c")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], weights[name]) for name in weights if name != init.CLASSES)


def test_rows_go_by_class_name():
    theirs = ["zero", "Golden Retriever, golden", "crane", "tench, Tinca tinca", "crane", "three"]
    ours = ["three", "tinca  Tinca", "tench", "golden_retriever", "new", "crane", "zero"]
    assert init.match_classes(theirs, ours) == [5, 3, 3, 1, None, None, 0]  # two cranes: neither is taken, unless its id tells
    assert init.match_classes(theirs, ["a", "b", "crane", "c"])[2] == 2
    names = imagenet.imagenet_names()
    assert init.match_classes(names, names) == list(range(1000))


@pytest.mark.parametrize(
    ("their_names", "our_names", "classes", "rows", "text"),
    [
        (["a", "b", "c", "d"], ["d", "x", "b"], 3, [3, None, 1], f"2 of 3 rows by class name, and the null row{NEW}x"),
        (["a", "b", "c", "d"], ["d"], 3, [3, None, None], f"1 of 3 rows by class name, and the null row{NEW}1, 2"),
        (None, ["p", "q", "r", "s"], 4, [0, 1, 2, 3], "4 of 4 rows by id (the source has no class names), and the null row"),
        (["a", "b", "c", "d"], None, 4, [0, 1, 2, 3], "4 of 4 rows by id (this run has no class names), and the null row"),
        (None, None, 2, [None, None], "0 of 2 rows (classes cannot be told apart: 4 there, 2 here"),
    ],
)  # fmt: skip
def test_the_table_of_classes(their_names, our_names, classes, rows, text):
    source, model = source_of({"num_classes": 4}, their_names, num_classes=classes)
    fresh, old = model.class_embedding.table.weight.detach().clone(), source.load()[init.CLASSES]
    changes = init.adapt(model, source, our_names, "v")
    (change,) = (change for change in changes if change.name == init.CLASSES)
    assert change.text.startswith(text) and change.kind == ("taken" if rows == [0, 1, 2, 3] else "adapted")
    table = model.class_embedding.table.weight
    assert torch.equal(table[-1], old[-1])
    for row, taken in enumerate(rows):
        assert torch.equal(table[row], old[:-1].mean(0) + fresh[row] if taken is None else old[taken])


def test_another_prediction_begins_with_a_new_output():
    """The blocks are taken: what they know of pictures serves both."""
    source, model = source_of({"num_classes": 4}, None, num_classes=4)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    changes = init.adapt(model, source, None, "x")
    new = {change.name: change.text for change in changes if change.kind == "new"}
    assert new == dict.fromkeys(init.OUTPUT, "it predicts v there, x here")
    old = source.load()
    for name, p in model.named_parameters():
        assert torch.equal(p, (fresh if name in init.OUTPUT else old)[name]), name


@pytest.mark.parametrize("positions", ["absolute", "rope_1d", "rope_2d"])
@pytest.mark.parametrize("size", [64, 16])
def test_another_size(positions, size):
    """Rotary tables are those of the new size; learned positions are resampled on the grid; everything else is as it was."""
    source, model = source_of({"positions": positions}, positions=positions, input_size=size)
    old = source.load()
    changes = {change.name: change for change in init.adapt(model, source, None, "v")}
    side = size // 4
    for name, p in model.named_parameters():
        if name != "positions":
            assert torch.equal(p, old[name]), name
    if positions == "absolute":
        grid = old["positions"].view(8, 8, -1).movedim(2, 0)[None]
        wanted = interpolate(grid, size=(side, side), mode="bicubic", antialias=size < 32)
        assert torch.equal(model.positions, wanted[0].movedim(0, 2).reshape(side * side, -1))
        assert changes["positions"].text == f"8x8 to {side}x{side} tokens, bicubic"
    else:
        assert torch.equal(model.cos, rope_tables(model.config)[0]) and len(model.cos) == side * side
        assert changes[f"{positions} table"].text == f"8x8 to {side}x{side} tokens, computed"
    assert model(torch.randn(2, 1, size, size), torch.rand(2), torch.tensor([0, 10])).isfinite().all()


def test_learned_positions_keep_their_place_in_the_image():
    """Rows stay rows: positions that name their row and column are, on a grid twice as fine, interpolated between them."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    finer = init._resampled(torch.stack((rows.flatten(), columns.flatten()), 1), 16).view(16, 16, 2)
    inner = torch.arange(4, 12) / 2 - 0.25  # pixel centres, away from the edge
    off = 3 / 64 + 1e-5  # Keys' kernel with a = -3/4, PyTorch's, leaves a line by 3/64 at a quarter
    torch.testing.assert_close(finer[4:12, 6, 0], inner, atol=off, rtol=0)
    torch.testing.assert_close(finer[6, 4:12, 1], inner, atol=off, rtol=0)


@pytest.mark.parametrize("ours", [{"patch_size": 2}, {"in_channels": 3}, {"patch_size": 8, "input_size": 64}])
def test_another_patch_or_channel_count_begins_anew(ours):
    source, model = source_of({"positions": "absolute"}, **ours)
    fresh, old = {name: p.detach().clone() for name, p in model.named_parameters()}, source.load()
    changes = init.adapt(model, source, None, "v")
    assert [change.name for change in changes if change.kind == "new"] == list(init.PATCHES)
    same_grid = ours.get("input_size", 32) // ours.get("patch_size", 4) == 8
    for name, p in model.named_parameters():
        if name in init.PATCHES:
            assert torch.equal(p, fresh[name]), name
        elif name != "positions" or same_grid:
            assert torch.equal(p, old[name]), name


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"depth": 3, "width": 32}, ["model.width=32", "model.depth=3", "set model.width=64 model.depth=2"]),
        ({"heads": 1}, ["set model.heads=2"]),
        ({"hidden": 64}, ["set model.hidden=128"]),
        ({"positions": "rope_2d"}, ["set model.positions=absolute"]),
        ({"class_width": 8}, ["model.class_width=8", "set model.class_width=null"]),
        ({"qk_norm": "none"}, ["set model.qk_norm=head"]),
        ({"modulation_groups": 2}, ["model.modulation_groups=2", "set model.modulation_groups=null"]),
    ],
)
def test_another_architecture_is_one_sentence(model, expected):
    theirs = from_dict({"model": {"preset": "test/4"}}).model
    with pytest.raises(InputError) as caught:
        init.check(theirs, from_dict({"model": {"preset": "test/4", **model}}).model, "runs/x")
    assert all(text in str(caught.value) for text in ["train.init=runs/x", *expected]), caught.value


def test_a_dense_run_begins_from_a_sparse_one():
    sparse = {"depth": 3, "dense_blocks": (1, 1)}
    source, model = source_of({**sparse, "keep_tokens": 0.25, "path_drop": 0.1}, **sparse)
    init.check(source.config.model, model.config, "runs/x")
    init.adapt(model, source, None, "v")
    weights = source.load()
    assert "fusion.mask" in weights and all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with pytest.raises(InputError, match=r"model\.dense_blocks=null: set model\.dense_blocks=\[1,1\]"):
        init.check(source.config.model, from_dict({"model": {"preset": "test/4", "depth": 3}}).model, "runs/x")


def test_what_may_differ_passes():
    theirs = from_dict({"model": {"preset": "test/4", "modulation_groups": 1}}).model
    ours = {"input_size": 64, "in_channels": 3, "patch_size": 8, "num_classes": 3, "zero_init_gates": False, "attention": "sdpa"}
    init.check(theirs, from_dict({"model": {"preset": "test/4", **ours}}).model, "runs/x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.init=nowhere"], ["train.init=nowhere", "no complete checkpoint", "owner/name"]),
        (
            ["train.init={trained}", "train.init_weights=ema_0.9"],
            ["holds no ema_0.9", "ema, ema_0.5, raw", "train.init_weights=ema"],
        ),
        (["train.init={trained}", "model.depth=3"], ["model.depth=3", "set model.depth=2"]),
        (["train.init={trained}", "train.resume={trained}"], ["both name a start"]),
        (["train.init={trained}/checkpoints"], ["no complete checkpoint"]),
        (["train.init={trained}/config.json"], ["no complete checkpoint"]),
        (["train.init=nowhere.pkl"], ["nowhere"]),
        (["train.init=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["flow.time_shift=0"], ["flow.time_shift=0.0 must be above 0"]),
    ],
)
def test_bad_sources_leave_nothing_behind(trained, tmp_path, capsys, words, expected):
    words = [word.replace("{trained}", str(trained)) for word in words]
    complains(capsys, ["train", *settings(tmp_path / "out", *words)], *expected)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, capsys, monkeypatch):
    """A path whose first folder exists is a path: the Hub is not asked about a typing error."""
    asked = []

    class Unreachable:
        def model_info(self, repository, revision, timeout):
            asked.append((repository, revision, timeout))
            raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    complains(
        capsys,
        ["train", *settings(tmp_path / "out", "train.init=someone/birds@v2")],
        "train.init=someone/birds",
        "no route to host",
        "hf download someone/birds --revision v2",
    )
    assert asked == [("someone/birds", "v2", hub.TIMEOUT_S)]
    (tmp_path / "runs").mkdir()
    complains(capsys, ["train", *settings(tmp_path / "out", "train.init=runs/brids")], "train.init=runs/brids holds no complete")
    assert len(asked) == 1


def test_advice_for_larger_latents_and_other_autoencoders():
    source, _ = source_of({})
    advice = lambda shift, **model: init.notes(
        source, from_dict({"model": {"preset": "test/4", **model}, "flow": {"time_shift": shift}}), None
    )
    (note,) = advice(1.0, input_size=64)
    assert "4,096 elements, the source's 1,024" in note and "flow.time_shift=2 would" in note and note.endswith("this run has 1")
    assert advice(2.0, input_size=64) == advice(1.0) == advice(1.0, input_size=16) == []
    assert "flow.time_shift=1.732 " in advice(1.0, in_channels=3)[0]
    config = from_dict({"model": {"preset": "test/4"}, "data": {"autoencoder": "vae"}})
    assert init.notes(source, config, "abc") == [
        "note: the source was trained on latents of pixels, this run trains on those of vae"
    ]
    same, other = source._replace(autoencoder_sha256="abc"), source._replace(autoencoder_sha256="def")
    assert init.notes(same, config, "abc") == [] and len(init.notes(other, config, "abc")) == 1
