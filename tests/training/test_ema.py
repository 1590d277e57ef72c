"""EMA against a plain reference. The run on two ranks is in test_ranks.py."""

import torch

from commands import complains, settings
from fastdit import checkpoint, cli
from fastdit.config import parse
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.loop import train


def test_ema_is_the_plain_recurrence_with_its_ramp():
    g = torch.Generator().manual_seed(0)
    masters = [torch.randn(7, generator=g), torch.randn(3, generator=g)]
    ema = ShardedEma([Fragment("a", 0, masters[0]), Fragment("b", 4, masters[1])], decay=0.9)
    expected = [m.double().clone() for m in masters]
    for n in range(150):
        for m in masters:
            m.add_(torch.randn(m.shape, generator=g))  # in place, as the optimizer does
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        expected = [d * e + (1 - d) * m.double() for e, m in zip(expected, masters, strict=True)]
    for average, reference in zip(ema.averages, expected, strict=True):
        torch.testing.assert_close(average.double(), reference, rtol=0, atol=1e-5)


def test_a_rank_may_own_nothing():
    ShardedEma([], 0.9).update()


def test_several_decays_are_each_their_own_recurrence():
    g = torch.Generator().manual_seed(0)
    master = torch.randn(7, generator=g)
    both, alone = ShardedEma([Fragment("a", 0, master)], 0.5, 0.9), ShardedEma([Fragment("a", 0, master)], 0.9)
    first = ShardedEma([Fragment("a", 0, master)], 0.5)
    for _ in range(30):
        master.add_(torch.randn(7, generator=g))
        for ema in (both, alone, first):
            ema.update()
    assert list(both.all) == ["ema", "ema_0.9"]
    assert torch.equal(both.all["ema_0.9"][0], alone.averages[0]) and torch.equal(both.averages[0], first.averages[0])


def test_several_averages_are_kept_resumed_and_sampled(tmp_path, capsys):
    words = ["train.sample_steps=0", "train.ema_decay=0.2", "train.ema_more=[0.1,0]", "train.schedule=constant"]
    uninterrupted = train(parse(None, settings(tmp_path, "train.total_steps=6", "train.name=uninterrupted", *words)))
    for total in (2, 6):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", *words)))
    load = lambda run, kind: checkpoint.open_checkpoint(run).load_model(kind, torch.device("cpu")).state_dict()
    models = {kind: load(run, kind) for kind in ("raw", "ema", "ema_0.1", "ema_0")}
    for kind, weights in models.items():
        assert all(torch.equal(weights[name], tensor) for name, tensor in load(uninterrupted, kind).items())
    assert all(torch.equal(models["ema_0"][name], tensor) for name, tensor in models["raw"].items())
    assert any((models["ema_0.1"][name] != tensor).any() for name, tensor in models["ema"].items())
    assert cli.main(["sample", "--checkpoint", str(run), "--weights", "ema_0.1", "--out", str(tmp_path / "a.png")]) == 0
    complains(capsys, ["sample", "--checkpoint", str(run), "--weights", "ema_0.5"], "holds no ema_0.5", "ema, ema_0, ema_0.1, raw")
    complains(capsys, ["train", *settings(tmp_path, "train.ema_more=0.5")], "train.ema_more='0.5' must be a list")
    complains(capsys, ["train", *settings(tmp_path, "train.ema_more=[1]")], "train.ema_more=1.0")
    complains(capsys, ["train", *settings(tmp_path, "zero.offload=true", "zero.stage=1")], "zero.offload=true needs zero.stage=2")
