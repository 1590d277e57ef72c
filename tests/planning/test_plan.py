"""The plan against published trainers, and what it says."""

import json

import pytest

from commands import complains
from fastdit import cli
from fastdit.planning import cards, plan

XL_1 = ["model.patch_size=1", "model.input_size=16", "model.in_channels=32"]  # LightningDiT-XL/1 on 16x16x32 latents


@pytest.mark.parametrize(
    ("card", "gpus", "words", "images_per_s"),
    [("a100", 1, [], 107), ("h800", 8, XL_1, 8 * 284)],  # fast-DiT's README; LightningDiT, arXiv:2501.01423
)
def test_published_rates_are_within_the_range(card, gpus, words, images_per_s, record_property):
    """The MFU that each anchor implies, rate times FLOPs over the datasheet, lies in the predicted range; the slow end, which is
    the geometric mean of both trainers' slowness, within 25 % of it."""
    config = plan.settings(None, ["model.preset=XL/2", "train.batch_size=32", *words])
    made = plan.make(config, cards.CARDS[card], gpus)
    implied = images_per_s / gpus * made["flops_per_image"]["total"] / cards.CARDS[card].bf16
    record_property("mfu", {"implied": implied, **made["mfu"]})
    assert implied == pytest.approx(made["mfu"]["slow"], rel=0.25)
    assert implied < made["mfu"]["fast"]


def test_memory_falls_with_the_stage_and_with_recomputing():
    config = plan.settings(None, ["model.preset=L/2", "train.batch_size=16"])
    made = plan.make(config, cards.CARDS["h100"], 8, 1, 1000, 2.0)
    peaks = [values["peak"] for values in made["memory"]["stages"].values()]
    assert peaks[0] > peaks[1]
    largest = made["memory"]["largest_batch"]
    assert largest["none"] < largest["light"] < largest["full"]
    assert made["run"]["cost"]["fast"] == pytest.approx(made["run"]["hours"]["fast"] * 8 * 2.0)


def test_one_gpu_has_one_row_and_what_does_not_fit_is_said():
    made = lambda gpus, batch: plan.make(
        plan.settings(None, ["model.preset=XL/2", f"train.batch_size={batch}"]), cards.CARDS["rtx4090"], gpus, 80, 1000, None
    )
    assert list(made(1, 8)["memory"]["stages"]) == [0] and list(made(8, 8)["memory"]["stages"]) == [0, 1, 2, 3]
    largest = made(1, 8)["memory"]["largest_batch"]["none"]
    assert made(1, largest)["memory"]["fits"] and "does not fit" not in plan.describe(made(1, largest))
    over = made(1, largest + 1)
    assert not over["memory"]["fits"]
    line = next(line for line in plan.describe(over).splitlines() if line.startswith("does not fit: "))
    assert f"at most {largest} do" in line and f"{over['memory']['largest_batch']['full']} with full" in line
    tight = cards.CARDS["rtx4090"]._replace(memory=10e9)  # less than the weights' states
    config = plan.settings(None, ["model.preset=XL/2"])
    assert "not one does: use more GPUs" in plan.describe(plan.make(config, tight, 1, 80, 1000, None))


def test_small_models_are_told_in_megabytes():
    config = plan.settings(None, ["model.preset=nano/4"])
    text = plan.describe(plan.make(config, cards.CARDS["h100"], 1, 80, 1000, None))
    assert "4.2 MB" in text and " 0.0 GB" not in text


def test_command_and_bad_input(capsys):
    assert cli.main(["plan", "--preset", "S/2", "--gpus", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["prediction"] and made["memory"]["stage"] == 0
    assert cli.main(["plan", "--preset", "S/2", "--price-per-gpu-hour", "2"]) == 0
    assert "nothing here was measured" in capsys.readouterr().out
    for words in (["--gpu", "h1000"], ["--gpus", "0"], ["--preset", "X/9"], ["--epochs", "-1"], ["model.nonsense=1"]):
        complains(capsys, ["plan", *words])
