"""EMA against a plain reference. The two-rank run is in test_distributed.py."""

import torch

from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment


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
