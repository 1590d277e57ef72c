"""A stand-in for the fast path of a GPU: CUDA graphs that run on the CPU, and the number of their calls; what they may change."""

import cuda_graphs
from fastdit.evaluation import metrics
from fastdit.sampling import sampler
from fastdit.sampling.fast import Graphs


class Calls:
    """velocity: calls of fast velocities; prepared: models that were made fast."""

    def __init__(self) -> None:
        self.velocity = 0
        self.prepared = 0


def install(monkeypatch) -> Calls:
    """Give every Sampler the velocity of `fast.Graphs`, and count its calls."""
    calls = Calls()
    cuda_graphs.install(monkeypatch)

    class CountedGraphs(Graphs):
        def __call__(self, *arguments):
            calls.velocity += 1
            return super().__call__(*arguments)

    def fast_velocity(model, device):
        calls.prepared += 1
        return CountedGraphs(model)

    monkeypatch.setattr(sampler, "fast_velocity", fast_velocity)
    return calls


def recorded_features(monkeypatch) -> list:
    """Return the list that the features [n,d] of the samples of each later comparison are added to."""
    features, compare = [], metrics.compare

    def recording(samples, reference, device):
        features.append(samples.features)
        return compare(samples, reference, device)

    monkeypatch.setattr(metrics, "compare", recording)
    return features


def root_distance_bound(features, others) -> float:
    """Return how far the square roots of two sets' Fréchet distances to a reference can be apart, of features [n,d] in pairs.

    The root is the Wasserstein distance of Gaussians, a metric, and that of two sets is at most the root mean square of the
    distances in pairs (Gelbrich 1990), times √(n/(n−1)) because covariances are unbiased. 1e-6: rounding of the root in fp64.
    """
    squares = (features.double() - others.double()).square().sum(1)
    return (squares.sum() / (len(features) - 1)).sqrt().item() + 1e-6
