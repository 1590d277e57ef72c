"""EMA against a plain reference, and whole parameters from shards. The two-rank run is in test_distributed.py."""

import pytest
import torch

from fastdit.ema import ShardedEma, merge
from fastdit.engine import Fragment


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


def test_state_survives_and_starts_where_it_stopped():
    a, b = torch.ones(4), torch.ones(4)
    first, second = ShardedEma([Fragment("w", 2, a)], 0.99), ShardedEma([Fragment("w", 2, b)], 0.99)
    a.fill_(3)
    first.update()
    assert list(first.state_dict()) == ["w@2"]
    second.load_state_dict(first.state_dict(), first.updates)
    b.fill_(3)
    first.update()
    second.update()
    assert torch.equal(first.averages[0], second.averages[0])


def test_a_rank_may_own_nothing():
    ShardedEma([], 0.9).update()


def test_merge_makes_whole_parameters_and_refuses_holes():
    shards = {"x.w@4": torch.arange(4.0, 6), "x.w@0": torch.arange(4.0), "b@0": torch.ones(2)}
    shapes = {"x.w": torch.Size((2, 3)), "b": torch.Size((2,))}
    whole = merge(shards, shapes)
    assert torch.equal(whole["x.w"], torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match=r"x\.w leave a hole at element 0"):
        merge({k: v for k, v in shards.items() if k != "x.w@0"}, shapes)
    with pytest.raises(ValueError, match=r"x\.w hold 4 of 6"):
        merge({k: v for k, v in shards.items() if k != "x.w@4"}, shapes)
