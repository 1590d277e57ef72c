"""The plan's sums against torch's FLOP counter and against published trainers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastdit import cli, distributed, flops, flow, kernels
from fastdit.data import imagenet
from fastdit.model import DiT
from fastdit.planning import cards, memory, plan
from fastdit.training import engine
from fastdit.training.ema import ShardedEma

XL_1 = ["model.patch_size=1", "model.input_size=16", "model.in_channels=32"]  # LightningDiT-XL/1 on 16x16x32 latents


@pytest.mark.parametrize(
    ("card", "gpus", "words", "images_per_s"),
    [("a100", 1, [], 107), ("h800", 8, XL_1, 8 * 284)],  # fast-DiT's README; LightningDiT, arXiv:2501.01423
)
def test_published_rates_are_within_the_range(card, gpus, words, images_per_s):
    """The MFU that each anchor implies, rate times FLOPs over the datasheet, lies in the predicted range; the slow end, which is
    the geometric mean of both trainers' slowness, within 25 % of it."""
    config = plan.settings(None, ["model.preset=XL/2", "train.batch_size=32", *words])
    made = plan.make(config, cards.CARDS[card], gpus, 80, imagenet.COUNTS["train"], None)
    implied = images_per_s / gpus * made["flops_per_image"]["total"] / cards.CARDS[card].bf16
    print(f"{card}: implied MFU {implied:.3f}, predicted {made['mfu']['slow']:.3f} to {made['mfu']['fast']:.3f}")
    assert implied == pytest.approx(made["mfu"]["slow"], rel=0.25)
    assert implied < made["mfu"]["fast"]


@pytest.mark.parametrize(
    "words",
    [
        ["model.width=256", "train.batch_size=8"],  # mostly activations
        ["model.width=256", "train.batch_size=8", "train.recompute=full"],
        ["model.width=512", "train.batch_size=1", "train.accumulation=2"],  # mostly weights
    ],
)
def test_memory_is_what_the_tensors_of_a_real_step_take(words):
    """The tensors of three steps under the engine, on a CPU with one rank, by the counter that plan uses on the meta device."""
    shape = ["model.preset=S/2", "model.depth=4", "model.heads=4", "model.input_size=16"]
    config = plan.settings(None, [*shape, "train.precision=fp32", *words])
    world, train = distributed.start("cpu"), config.train
    with flops.LiveBytes([]) as live:
        model = DiT(config.model)
        running = engine.initialize(model, config, world)
        ema = ShardedEma(engine.fragments(running, world), train.ema_decay)
        for step in range(3):
            for micro in range(train.accumulation):
                ids = flow.sample_ids(step, micro * train.batch_size, train.batch_size, world.device)
                x0, labels = torch.randn(train.batch_size, 4, 16, 16), torch.zeros(train.batch_size, dtype=torch.int64)
                losses = flow.losses(running, x0, labels, ids, config.flow, seed=0, null=config.model.num_classes)
                running.backward(losses.total.mean())
                running.step()
            ema.update()
    predicted = memory.memory(config, 1).peak
    print(f"{live.peak / 1e6:.1f} MB, predicted {predicted / 1e6:.1f}")
    fused = kernels.backend_in_use(world.device) != "reference"  # references keep more for the backward
    assert live.peak == pytest.approx(predicted, rel=0.1 if fused else 0.2)


def test_memory_falls_with_the_stage_and_with_recomputing():
    config = plan.settings(None, ["model.preset=L/2", "train.batch_size=16"])
    made = plan.make(config, cards.CARDS["h100"], 8, 1, 1000, 2.0)
    peaks = [values["peak"] for values in made["memory"]["stages"].values()]
    assert peaks[0] > peaks[1]
    largest = made["memory"]["largest_batch"]
    assert largest["none"] < largest["light"] < largest["full"]
    assert made["run"]["cost"]["fast"] == pytest.approx(made["run"]["hours"]["fast"] * 8 * 2.0)


def test_one_gpu_holds_gradients_through_the_forward_only_to_add_them_up():
    """AdamW uses them up in each step: between steps only sums of several micro-steps are there, 4 bytes a parameter."""
    words = ["model.preset=S/2", "train.precision=fp32", "train.batch_size=64"]
    one, two = (memory.memory(plan.settings(None, [*words, f"train.accumulation={n}"]), 1, cards.CARDS["h100"]) for n in (1, 2))
    parameters = flops.walk(plan.settings(None, words).model, 1, torch.float32, "none").parameters
    assert two.peak - one.peak == 4 * parameters


def test_one_gpu_has_one_row_and_what_does_not_fit_is_said():
    made = lambda gpus, batch: plan.make(
        plan.settings(None, ["model.preset=XL/2", f"train.batch_size={batch}"]), cards.CARDS["rtx4090"], gpus, 80, 1000, None
    )
    assert list(made(1, 8)["memory"]["stages"]) == [0] and list(made(8, 8)["memory"]["stages"]) == [1, 2, 3]
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


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_has_gone_gets_no_traceback(form):
    """As `fastdit plan | head -1` has it. The text is below a pipe's and Python's buffers: it fails at the last flush."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        command = [sys.executable, "-m", "fastdit.cli", "plan", "--preset", "test/4", *form]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_devices_card_is_found_by_its_whole_name():
    assert cards.card_of("NVIDIA A100-SXM4-80GB") == cards.CARDS["a100"] and cards.card_of("NVIDIA H200") == cards.CARDS["h200"]
    slower = ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert not any(map(cards.card_of, (*slower, "AMD EPYC, 2 threads", "")))
    assert len({card.device for card in cards.CARDS.values()}) == len(cards.CARDS)


def test_command_and_bad_input(capsys):
    assert cli.main(["plan", "--preset", "S/2", "--gpus", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["prediction"] and made["memory"]["stage"] == 0
    assert cli.main(["plan", "--preset", "S/2", "--price-per-gpu-hour", "2"]) == 0
    assert "nothing here was measured" in capsys.readouterr().out
    for words in (["--gpu", "h1000"], ["--gpus", "0"], ["--preset", "X/9"], ["--epochs", "-1"], ["model.nonsense=1"]):
        assert cli.main(["plan", *words]) == 2
        assert capsys.readouterr().err.startswith("fastdit: ")
