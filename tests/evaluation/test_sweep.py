"""`fastdit sweep`: a table, a CSV and a picture over a grid of settings, from one opened checkpoint by the fast path."""

import json

import pytest
from PIL import Image

import fast_paths
from fastdit import checkpoint, cli
from fastdit.evaluation import metrics
from fastdit.evaluation import sweep as sweep_command
from fastdit.evaluation.command import EvaluationRequest
from fastdit.evaluation.sweep import Row, as_csv, best, sweep_table
from runs import not_finite_run


def test_sweep(trained, reference, tmp_path, capsys, monkeypatch):
    """Its numbers are those of `fastdit evaluate`; the checkpoint is verified once, and loaded once for each kind of weights."""
    verified, loaded = [], []
    find, load_model = checkpoint.find, checkpoint.Checkpoint.load_model
    monkeypatch.setattr(checkpoint, "find", lambda path: verified.append(path) or find(path))
    monkeypatch.setattr(
        checkpoint.Checkpoint, "load_model", lambda self, kind, device: loaded.append(kind) or load_model(self, kind, device)
    )
    out = tmp_path / "sweep.csv"
    words = ["--features", "digits", "--reference", str(reference), "--samples", "20", "--out", str(out)]
    assert cli.main(["sweep", str(trained), "guidance=0,3", "weights=ema,raw", *words]) == 0
    assert len(verified) == 1 and loaded == ["ema", "raw"]
    rows = out.read_text().splitlines()
    assert rows[0].startswith("guidance,weights,fid,kid") and len(rows) == 5
    values = [row.split(",") for row in rows[1:]]
    assert [value[:2] for value in values] == [["0.0", "ema"], ["0.0", "raw"], ["3.0", "ema"], ["3.0", "raw"]]
    fids = [float(value[2]) for value in values]
    assert ["fid" in value[-3].split() for value in values].index(True) == fids.index(min(fids)) and len(set(fids)) == 4
    digest = metrics.load(reference).sha256()
    assert {(value[-2], value[-1]) for value in values} == {("500", digest)}
    output = capsys.readouterr().out
    assert f"reference: {reference}, 500 images, SHA-256 of mean and covariance {digest[:16]}" in output
    printed = [line for line in output.splitlines() if line.startswith("*")]
    assert len(printed) == 1 and f"{min(fids):.6g}*" in printed[0]
    picture = Image.open(out.with_suffix(".png"))
    assert picture.height == 4 * 36 and picture.width > 10 * 34
    single = ["--samples", "20", "--guidance", "3", "--weights", "raw", "--out", str(tmp_path / "a.json")]
    assert cli.main(["evaluate", str(trained), "--features", "digits", "--reference", str(reference), *single]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["metrics"]["fid"] == pytest.approx(fids[3], rel=1e-5) and result["reference"]["statistics_sha256"] == digest
    for word in ("guidance", "guidanse=1", "steps=1,x"):
        assert cli.main(["sweep", str(trained), word, *words]) == 2


def test_a_sweep_draws_by_the_fast_path(trained, reference, tmp_path, monkeypatch):
    """All settings of one kind of weights by one model that was made fast once; numbers as of the plain path."""
    features = fast_paths.recorded_features(monkeypatch)
    request = EvaluationRequest("digits", str(reference), str(trained), samples=20, dtype="fp32")
    axes = {"guidance": [0.0, 3.0], "weights": ["ema", "raw"]}
    plain = sweep_command.sweep(request, axes, tmp_path / "plain.csv")
    calls = fast_paths.install(monkeypatch)
    fast = sweep_command.sweep(request, axes, tmp_path / "fast.csv")
    assert calls.prepared == 2 and calls.velocity == 4 * 2  # settings, each one batch of two steps
    for i, (one, other) in enumerate(zip(plain, fast, strict=True)):
        difference = abs(one.metrics["fid"] ** 0.5 - other.metrics["fid"] ** 0.5)
        assert difference <= fast_paths.root_distance_bound(features[i], features[4 + i])


def test_the_best_values_of_each_metric_are_marked_and_lists_are_no_column():
    made = ((8, 3.0, 0.5, 0.25), (15, 2.0, 0.75, 0.125), (20, 2.5, 0.75, 0.0625))
    rows = [
        Row({"steps": n}, {"fid": fid, "kid": kid, "recall": recall, "accuracy_by_class": [0.5]}, None, {"images": 9})
        for n, fid, recall, kid in made
    ]
    assert best(rows) == 1
    assert sweep_table(rows).splitlines() == [
        "  steps  fid      kid   recall",
        "      8    3     0.25      0.5",
        "*    15    2*   0.125     0.75*",
        "     20  2.5   0.0625*    0.75*",
    ]
    assert as_csv(rows).splitlines()[2] == "15,2,0.125,0.75,fid recall,9,"
    assert sweep_table([]) == ""


def test_a_row_that_is_not_finite_says_so_and_is_never_the_best():
    rows = [Row({"guidance": g}, {"fid": fid} if fid else {}, None) for g, fid in ((0, None), (1, 3.0), (2, 4.0), (3, None))]
    assert best(rows) == 1 and best(rows[:1]) is None
    assert sweep_table(rows).splitlines() == [
        "  guidance         fid",
        "         0  not finite",
        "*        1           3*",
        "         2           4",
        "         3  not finite",
    ]


def test_a_sweep_of_samples_that_are_not_finite_is_an_error(reference, tmp_path, capsys):
    run = not_finite_run(tmp_path / "run")
    words = ["--features", "digits", "--reference", str(reference), "--samples", "10", "--out", str(tmp_path / "s.csv")]
    assert cli.main(["sweep", str(run), "steps=1,2", *words]) == 1
    error = capsys.readouterr().err
    assert "sample 0 of class 0 is not finite after 2 steps" in error and "the samples of no setting are finite" in error
    assert (tmp_path / "s.csv").read_text().startswith("steps,fid,best,reference_images,reference_sha256\n1,not finite,,500,")
    assert cli.main(["evaluate", str(run), *words[:-1], str(tmp_path / "e.json")]) == 1
    assert not (tmp_path / "e.json").exists()
