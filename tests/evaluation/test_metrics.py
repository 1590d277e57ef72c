"""Distances against independent fp64 numpy and scipy, in closed form, and accumulated in odd batches over ranks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import forked_ranks
from fastdit.config import InputError
from fastdit.distributed import World
from fastdit.evaluation import metrics

ALONE = World(0, 1, torch.device("cpu"), None)
SUPPORT = Path(__file__).parent.parent / "support"


def cloud(count, width=24, shift=0.0, seed=0):
    """Correlated, skewed fp32 features, far from the origin as Inception's are."""
    generator = np.random.default_rng(seed)
    mixed = generator.exponential(size=(count, width)) @ generator.normal(size=(width, width)) * 0.3
    return (mixed + 1 + shift).astype(np.float32)


def numpy_frechet(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real


def numpy_kid(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    n, m = len(x), len(y)
    xx = kernel(x, x)[~np.eye(n, dtype=bool)].sum() / (n * (n - 1))
    yy = kernel(y, y)[~np.eye(m, dtype=bool)].sum() / (m * (m - 1))
    return xx + yy - 2 * kernel(x, y).mean()


def summary(x, batch=13, order=None, probabilities=None, keep=10**6):
    x = torch.from_numpy(x)
    p = None if probabilities is None else torch.from_numpy(probabilities)
    statistics = metrics.Statistics(len(x), keep, (x.shape[1], 0 if p is None else p.shape[1], 0), ALONE.device)
    for ids in (torch.arange(len(x)) if order is None else order).split(batch):
        statistics.update(ids, metrics.Outputs(x[ids], None if p is None else p[ids]))
    return statistics.summary(ALONE)


def distance(a, b):
    return metrics.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def test_frechet_distance_and_kid_equal_numpy_in_fp64(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 64)  # odd blocks at the ends
    x, y = cloud(301), cloud(207, shift=0.1, seed=1)
    a, b = summary(x), summary(y)
    assert distance(a, b) == pytest.approx(numpy_frechet(x, y), rel=1e-6)
    assert metrics.kernel_distance(a.features, b.features) == pytest.approx(numpy_kid(x, y), rel=1e-6)
    assert numpy_kid(x, y) > 1e-3


def test_two_gaussians_in_closed_form():
    """Of commuting covariances: |Δμ|² + Σ (√λ − √λ')²."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator)).Q
    values = torch.rand(2, 40, dtype=torch.float64, generator=generator)
    values[:, :10] = 0  # singular
    mu = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    sigmas = [basis @ torch.diag(v) @ basis.T for v in values]
    wanted = (mu[0] - mu[1]).square().sum() + (values[0].sqrt() - values[1].sqrt()).square().sum()
    assert metrics.frechet_distance(mu[0], sigmas[0], mu[1], sigmas[1]) == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("count", [300, 20])  # 20: a singular covariance
def test_a_set_has_no_distance_to_itself_in_any_order(count):
    x = cloud(count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    a, b = summary(x), summary(x, batch=7, order=shuffled)
    assert abs(distance(a, b)) < 1e-6
    y = summary(cloud(90, shift=0.2, seed=2))
    assert distance(a, y) == pytest.approx(distance(b, y), rel=1e-9)
    assert metrics.kernel_distance(a.features, y.features) == metrics.kernel_distance(b.features, y.features)


def test_two_ranks_and_odd_batches_find_the_same(tmp_path):
    x, y = cloud(151), summary(cloud(90, shift=0.2, seed=2))
    logits = np.random.default_rng(3).normal(size=(151, 5)) * 2
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    np.savez(tmp_path / "features.npz", x=x, p=p)
    done = forked_ranks.run(2, [SUPPORT / "metrics_worker.py", tmp_path])
    assert done.returncode == 0, done.stderr[-3000:]
    found, alone = metrics.load(tmp_path / "found.npz"), summary(x, probabilities=p)
    assert torch.equal(found.features, torch.from_numpy(x))  # by id, whatever rank they came from
    assert distance(found, y) == pytest.approx(numpy_frechet(x, y.features.numpy()), rel=1e-6)
    assert metrics.kernel_distance(found.features, y.features) == pytest.approx(numpy_kid(x, y.features.numpy()), rel=1e-6)
    assert json.loads((tmp_path / "score.json").read_text()) == pytest.approx(alone.inception_score, rel=1e-9)


def test_inception_score_is_the_mean_over_splits(monkeypatch):
    monkeypatch.setattr(metrics, "SPLIT", 50)
    p = np.random.default_rng(0).dirichlet(np.full(7, 0.3), 100).astype(np.float32)
    p[0] = np.eye(7)[0]  # zeros: 0·log 0 is 0
    p[1:] = np.maximum(p[1:], 1e-30)
    scores = []
    for part in (p[0::2].astype(np.float64), p[1::2].astype(np.float64)):
        kl = np.where(part > 0, part * (np.log(np.maximum(part, 1e-300)) - np.log(part.mean(0))), 0).sum(1)
        scores.append(np.exp(kl.mean()))
    assert summary(cloud(100), probabilities=p).inception_score == pytest.approx(np.mean(scores), rel=1e-6)
    same = np.full((100, 7), 1 / 7, np.float32)
    assert summary(cloud(100), probabilities=same).inception_score == pytest.approx(1)
    sure = np.eye(7, dtype=np.float32)[np.arange(98) % 7]
    assert summary(cloud(98), probabilities=sure).inception_score == pytest.approx(7)


def test_precision_and_recall_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 32)
    real, fake = cloud(97, 3).astype(np.float64), cloud(71, 3, shift=0.5, seed=1).astype(np.float64)

    def share(of, manifold):
        gaps = np.sort(np.linalg.norm(manifold[:, None] - manifold[None], axis=-1), axis=1)[:, 3]  # 0 is the sample itself
        return (np.linalg.norm(of[:, None] - manifold[None], axis=-1) <= gaps).any(1).mean()

    found = metrics.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx((share(fake, real), share(real, fake)))
    assert 0.1 < found[0] < 0.99 and 0.1 < found[1] < 0.99


def test_nearest_distances_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 32)
    x, y = torch.from_numpy(cloud(97, 5)), torch.from_numpy(cloud(71, 5, shift=0.5, seed=1))
    gaps = torch.cdist(x.double(), y.double())
    torch.testing.assert_close(metrics.nearest_distances(x, y, False), gaps.amin(1), rtol=1e-6, atol=1e-6)
    x[80] = x[3]  # twice in the set
    gaps = torch.cdist(x.double(), x.double())
    gaps[gaps < 1e-6] = torch.inf
    torch.testing.assert_close(metrics.nearest_distances(x, x, True), gaps.amin(1), rtol=1e-6, atol=1e-6)


def test_every_metric_has_a_known_value():
    """The samples are the reference, moved by 5, far more than its spread: of a Fréchet distance only |Δμ|² is left, and neither
    manifold holds a sample of the other."""
    x = cloud(40, width=4) * np.float32(0.05)
    y = x + np.float32([3, 4, 0, 0])
    sigma = torch.eye(2, dtype=torch.float64)
    spatial = [torch.full((2,), value, dtype=torch.float64) for value in (0.0, 2.0)]
    reference = replace(summary(x), mu_s=spatial[0], sigma_s=sigma)
    hits = torch.tensor([[3, 1], [0, 4]])
    samples = replace(summary(y), mu_s=spatial[1], sigma_s=sigma, inception_score=2.5, hits=hits)
    known = {
        "fid": 25,
        "sfid": 8,
        "kid": numpy_kid(y, x),
        "inception_score": 2.5,
        "precision": 0,
        "recall": 0,
        "accuracy": 7 / 8,
        "accuracy_by_class": [0.75, 1],
    }
    values = metrics.compare(samples, reference, ALONE.device)
    assert values.keys() == metrics.METRICS.keys() == known.keys()
    for name, value in known.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


def test_a_metric_without_its_statistics_is_left_out():
    """Files of other evaluators hold only means and covariances."""
    only_moments = replace(summary(cloud(40)), features=None)
    values = metrics.compare(summary(cloud(40, seed=1)), only_moments, ALONE.device)
    assert values.keys() >= {"fid"} and not values.keys() & {"sfid", "kid", "inception_score", "precision", "recall", "accuracy"}


def test_features_are_kept_evenly():
    x = cloud(100)
    assert torch.equal(summary(x, keep=30).features, torch.from_numpy(x[::4]))


def test_statistics_that_a_file_cannot_hold_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"x\.npz cannot be read"):
        metrics.load(path)
    np.savez(path, mu=np.zeros(4), sigma=np.zeros((3, 3)))
    with pytest.raises(InputError, match="no sigma of 4 x 4"):
        metrics.load(path)
    np.savez(path, mu=np.float64(0), sigma=np.zeros((1, 1)))
    with pytest.raises(InputError, match="holds mu of width 1"):
        metrics.load(path)
    np.save(tmp_path / "x.npy", np.zeros(4))
    with pytest.raises(InputError, match=r"x\.npy cannot be read as an \.npz"):
        metrics.load(tmp_path / "x.npy")
    np.savez(path, arr_0=np.zeros(3))
    assert metrics.load(path) is None
