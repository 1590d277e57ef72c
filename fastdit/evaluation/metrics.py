"""Statistics of image features, summed over batches and ranks, and the distances between two sets of them. No I/O but .npz.

n samples, b batch size, d feature width, k classes. Sums, covariances and distances are fp64.

The Fréchet distance follows the ADM evaluator (guided-diffusion, evaluations/evaluator.py: unbiased covariance, square root in
fp64), and precision and recall use its third neighbours. torchmetrics 1.9.0 was tried first: its Fréchet distance of 300 samples to
themselves at d = 512 is -4e-6 (eigenvalues of an unsymmetric product), its KID is fp32 (1.5e-3 off) and of random subsets, and
neither takes statistics from a file.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.config import InputError
from fastdit.distributed import World
from fastdit.files import replacing
from fastdit.progress import progress_bar

NEIGHBOUR = 3  # the neighbour whose distance is the radius of a sample, arXiv:1904.06991
SPLIT = 5000  # samples per Inception score; the mean over the splits is reported
BLOCK = 2048  # rows and columns per block of pairwise distances
BAD_NPZ = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # raised for a corrupt file


class Outputs(NamedTuple):
    """The outputs of a feature network: features fp32 [b,d]; class probabilities fp32 [b,k] and spatial features fp32 [b,s],
    None if it has none."""

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


@dataclass(frozen=True)
class Summary:
    """The statistics of a set of images.

    mu, sigma: mean fp64 [d] and covariance fp64 [d,d] of the features.
    mu_s, sigma_s: the same of spatial features, None without them.
    features: features fp32 [m,d] of evenly spread samples.
    hits: int64 [k,k], how many samples of the class of a row were recognised as the class of a column.
    about: where the images are from, as JSON types.
    """

    mu: Tensor
    sigma: Tensor
    mu_s: Tensor | None = None
    sigma_s: Tensor | None = None
    features: Tensor | None = None
    inception_score: float | None = None
    hits: Tensor | None = None
    about: dict = field(default_factory=dict)

    def sha256(self) -> str:
        """Return the SHA-256 of mean and covariance, the same wherever they lie."""
        return hashlib.sha256(self.mu.cpu().numpy().tobytes() + self.sigma.cpu().numpy().tobytes()).hexdigest()

    def to(self, device: torch.device) -> "Summary":
        """Return the same statistics on a device."""
        return replace(self, **{key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)})


class Moments:
    """Sums of vectors and of their outer products, in fp64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, vectors: Tensor) -> None:
        """Add vectors [b,d]."""
        vectors = vectors.double()
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.outer.addmm_(vectors.T, vectors)

    def sums(self) -> list[Tensor]:
        """Return the tensors to be added over ranks."""
        return [self.count, self.sum, self.outer]

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the mean [d] and the unbiased covariance [d,d]."""
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


class Statistics:
    """Accumulates the statistics of `count` images, whose batches may come in any order and on any rank."""

    def __init__(self, count: int, keep: int, widths: tuple[int, int, int], device: torch.device) -> None:
        """keep: largest number of features that are kept for KID, precision and recall; widths: widths of features, of
        probabilities and of spatial features, 0 without them."""
        self.count = count
        self.every = -(-count // keep)
        features, classes, spatial = widths
        self.moments = Moments(features, device)
        self.spatial = Moments(spatial, device) if spatial else None
        self.splits = max(1, count // SPLIT)
        self.probabilities = torch.zeros(self.splits, classes, dtype=torch.float64, device=device)
        self.entropies = torch.zeros(self.splits, dtype=torch.float64, device=device)  # sums of Σ p·log p
        self.members = torch.zeros(self.splits, dtype=torch.float64, device=device)
        self.hits = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self.chosen: list[tuple[Tensor, Tensor]] = []  # ids and features of every `every`-th image

    def update(self, ids: Tensor, outputs: Outputs, labels: Tensor | None = None) -> None:
        """Add the outputs of a batch.

        ids: int64 [b], each of 0 .. count−1 once; labels: classes of the samples, int64 [b], if the network knows them.

        A split of the Inception score takes samples at equal distances, not SPLIT in a row as in the ADM evaluator, because samples
        may be sorted by class.
        """
        self.moments.update(outputs.features)
        if self.spatial:
            assert outputs.spatial is not None  # its width is not 0
            self.spatial.update(outputs.spatial)
        if outputs.probabilities is not None:
            p, split = outputs.probabilities.double(), ids.to(self.members.device) % self.splits
            self.probabilities.index_add_(0, split, p)
            self.entropies.index_add_(0, split, torch.xlogy(p, p).sum(1))
            self.members.index_add_(0, split, torch.ones_like(p[:, 0]))
            if labels is not None:
                index = labels.to(p.device), p.argmax(1)
                self.hits.index_put_(index, torch.ones_like(p[:, 0]), accumulate=True)
        chosen = ids.cpu() % self.every == 0
        self.chosen.append((ids.cpu()[chosen], outputs.features.float().cpu()[chosen]))

    def summary(self, world: World) -> Summary:
        """Return the statistics of all ranks' images. Ranks other than 0 get no features. All ranks must call it, once."""
        chosen = self.chosen
        if world.size > 1:
            sums = [*self.moments.sums(), self.probabilities, self.entropies, self.members, self.hits]
            for tensor in sums + (self.spatial.sums() if self.spatial else []):
                dist.all_reduce(tensor)
            parts: list | None = [None] * world.size if world.rank == 0 else None
            dist.gather_object(chosen, parts, group=world.control)
            chosen = [pair for part in parts for pair in part] if parts else []
        if int(self.moments.count) != self.count:
            raise RuntimeError(f"{int(self.moments.count)} of {self.count} images were added")
        score = None
        if self.probabilities.shape[1]:
            p = self.probabilities / self.members[:, None]
            score = (self.entropies / self.members - torch.xlogy(p, p).sum(1)).exp().mean().item()
        mu, sigma = self.moments.result()
        mu_s, sigma_s = self.spatial.result() if self.spatial else (None, None)
        hits = self.hits.long() if self.hits.any() else None
        return Summary(mu, sigma, mu_s, sigma_s, _in_order(chosen), score, hits).to(torch.device("cpu"))


def _in_order(pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the features of pairs (ids, features) in the order of their ids; None without pairs."""
    if not pairs:
        return None
    ids, features = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return features[ids.argsort()]


def _factor(sigma: Tensor) -> Tensor:
    """Return L with L·Lᵀ = sigma, which is symmetric and, up to rounding, positive semidefinite."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(mu: Tensor, sigma: Tensor, mu_r: Tensor, sigma_r: Tensor) -> float:
    """Return |μ−μᵣ|² + tr(Σ + Σᵣ − 2·√(Σ·Σᵣ)) (arXiv:1706.08500, equation 6) of means [d] and covariances [d,d], fp64.

    The eigenvalues of √(Σ·Σᵣ) are the singular values of LᵀLᵣ for Σ = L·Lᵀ. These are exact to rounding even if covariances are
    singular, when the square roots of the product's small eigenvalues are not.
    """
    root = torch.linalg.svdvals(_factor(sigma).T @ _factor(sigma_r)).sum()
    return ((mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * root).item()


def _blocks(a: Tensor, b: Tensor, bar):
    """Yield slices of the rows of a and of b with the inner products of these rows, fp64 [at most BLOCK, at most BLOCK]."""
    for i in range(0, len(a), BLOCK):
        rows = a[i : i + BLOCK].double()
        for j in range(0, len(b), BLOCK):
            yield slice(i, i + BLOCK), slice(j, j + BLOCK), rows @ b[j : j + BLOCK].double().T
            bar.update()


def _bar(description: str, *pairs: tuple[Tensor, Tensor]):
    """Return a progress bar over the blocks of pairs of sets of rows, shown after 5 s."""
    blocks = sum(-(-len(a) // BLOCK) * -(-len(b) // BLOCK) for a, b in pairs)
    return progress_bar(blocks, description=description, unit="block", delay=5)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return KID, the unbiased squared maximum mean discrepancy of features [n,d] and [m,d] under k(a,b) = (a·b/d + 1)³
    (arXiv:1801.01401, section 4).

    It is taken over all pairs. Other evaluators average random subsets, which has the same expectation.
    """
    with _bar("KID", (x, x), (y, y), (x, y)) as bar:

        def total(a: Tensor, b: Tensor) -> float:
            return sum(((block / x.shape[1] + 1) ** 3).sum().item() for *_, block in _blocks(a, b, bar))

        def mean_of_pairs(a: Tensor) -> float:
            """The mean of k over pairs of different rows."""
            diagonal = ((a.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item()
            return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

        return mean_of_pairs(x) + mean_of_pairs(y) - 2 * total(x, y) / (len(x) * len(y))


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Return the share of fake samples in the real manifold and of real ones in the fake manifold (arXiv:1904.06991, equations 1
    and 2), of features [n,d] and [m,d] with n and m above NEIGHBOUR.

    A manifold is the union of balls around its samples whose radius is the distance to the NEIGHBOURth neighbour.
    """
    norms = {id(side): side.double().square().sum(1) for side in (real, fake)}
    with _bar("precision and recall", (real, real), (fake, fake), (real, fake)) as bar:

        def distances(a: Tensor, b: Tensor):
            for i, j, block in _blocks(a, b, bar):
                yield i, j, norms[id(a)][i, None] + norms[id(b)][j] - 2 * block

        def radii(side: Tensor) -> Tensor:
            nearest = torch.full((len(side), NEIGHBOUR + 1), torch.inf, dtype=torch.float64, device=side.device)  # itself is one
            for i, _, squares in distances(side, side):
                nearest[i] = torch.cat((nearest[i], squares), 1).topk(NEIGHBOUR + 1, largest=False).values
            return nearest.amax(1)

        real_radii, fake_radii = radii(real), radii(fake)
        inside_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
        inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        for i, j, squares in distances(real, fake):
            inside_real[j] |= (squares <= real_radii[i, None]).any(0)
            inside_fake[i] |= (squares <= fake_radii[j]).any(1)
    return inside_real.double().mean().item(), inside_fake.double().mean().item()


def nearest_distances(x: Tensor, y: Tensor, others: bool) -> Tensor:
    """Return the distance fp64 [n] of each of the features [n,d] to the nearest of the features [m,d].

    others: row i is not compared with row i, nor with equal rows, as of a picture that is in the set twice.
    """
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    norms = [side.double().square().sum(1) for side in (x, y)]
    with _bar("nearest", (x, y)) as bar:
        for i, j, block in _blocks(x, y, bar):
            sums = norms[0][i, None] + norms[1][j]
            squares = sums - 2 * block
            if others:
                rows, columns = (torch.arange(len(side), device=x.device)[part] for side, part in ((x, i), (y, j)))
                squares[(rows[:, None] == columns) | (squares <= 1e-9 * sums)] = torch.inf  # rounding of fp32 features
            nearest[i] = torch.minimum(nearest[i], squares.amin(1))
    return nearest.clamp(min=0).sqrt()


def _fid(samples: Summary, reference: Summary) -> dict:
    return {"fid": frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)}


def _sfid(samples: Summary, reference: Summary) -> dict:
    if samples.mu_s is None or reference.mu_s is None:
        return {}
    assert samples.sigma_s is not None and reference.sigma_s is not None  # made, and checked by `load`, with mu_s
    return {"sfid": frechet_distance(samples.mu_s, samples.sigma_s, reference.mu_s, reference.sigma_s)}


def _kid(samples: Summary, reference: Summary) -> dict:
    if samples.features is None or reference.features is None:
        return {}
    if min(len(samples.features), len(reference.features)) < 2:
        return {}
    return {"kid": kernel_distance(samples.features, reference.features)}


def _inception_score(samples: Summary, reference: Summary) -> dict:
    return {} if samples.inception_score is None else {"inception_score": samples.inception_score}


def _precision_recall(samples: Summary, reference: Summary) -> dict:
    if samples.features is None or reference.features is None:
        return {}
    if min(len(samples.features), len(reference.features)) <= NEIGHBOUR:
        return {}
    return dict(zip(("precision", "recall"), precision_recall(reference.features, samples.features), strict=True))


def _accuracy(samples: Summary, reference: Summary) -> dict:
    if samples.hits is None:
        return {}
    recognised, asked = samples.hits.diag(), samples.hits.sum(1)
    by_class = [round(share, 4) for share in (recognised / asked.clamp(min=1)).tolist()]
    return {"accuracy": (recognised.sum() / asked.sum()).item(), "accuracy_by_class": by_class}


class Metric(NamedTuple):
    """A distance or score of a set of samples.

    label: name in tables; {network} stands for the name of the feature network.
    larger_is_better: whether the larger of two values is the better one.
    compute: function of the statistics of samples and of the reference. It returns values by the names of their metrics: of all
        that it computes together, without those whose statistics are missing. A value is a number, or a list of one per class.
    """

    label: str
    larger_is_better: bool
    compute: Callable[[Summary, Summary], dict]


# In the order of tables. The first decides which setting of a sweep is the best.
METRICS = {
    "fid": Metric("FD ({network})", False, _fid),
    "sfid": Metric("sFID (unverified)", False, _sfid),
    "kid": Metric("KD ({network})", False, _kid),
    "inception_score": Metric("Inception score", True, _inception_score),
    "precision": Metric("precision", True, _precision_recall),
    "recall": Metric("recall", True, _precision_recall),
    "accuracy": Metric("accuracy", True, _accuracy),
    "accuracy_by_class": Metric("by class", True, _accuracy),
}


def compare(samples: Summary, reference: Summary, device: torch.device) -> dict:
    """Return the values of METRICS by name, without those whose statistics are missing. `device` computes them."""
    samples, reference = samples.to(device), reference.to(device)
    values: dict = {}
    for compute in dict.fromkeys(metric.compute for metric in METRICS.values()):
        values |= compute(samples, reference)
    return {name: values[name] for name in METRICS if name in values}


def scalars(values: dict) -> dict[str, float]:
    """Return the values of `compare` that are one number."""
    return {name: value for name, value in values.items() if not isinstance(value, list)}


def save(summary: Summary, path: Path) -> None:
    """Write an .npz as the ADM evaluator reads it (mu, sigma, mu_s, sigma_s), with the kept features and `about`."""
    arrays = {key: getattr(summary, key) for key in ("mu", "sigma", "mu_s", "sigma_s", "features")}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, about=json.dumps(summary.about), **{k: v.numpy() for k, v in arrays.items() if v is not None})


def _arrays(file) -> dict[str, Any]:
    """Return the statistics in an open .npz as tensors by name, fp64, features fp32. Raises ValueError if they are none."""
    arrays = {}
    for key in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        if key not in file:
            continue
        array = file[key]
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{key} is {array.dtype}")
        arrays[key] = torch.from_numpy(array.astype(np.float32 if key == "features" else np.float64))
        if not arrays[key].isfinite().all():
            raise ValueError(f"{key} holds values that are not finite")
    return arrays


def _check(arrays: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless the means, covariances and features of a file fit each other."""
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in arrays:
            continue
        width, sigma = arrays[mean].numel(), arrays.get(covariance)
        if not width or arrays[mean].ndim != 1 or sigma is None or sigma.shape != (width, width):
            raise InputError(f"{path} holds {mean} of width {width} but no {covariance} of {width} x {width}: make it again")
        if (sigma - sigma.T).abs().max() > 1e-5 * sigma.abs().max() or sigma.diagonal().min() < 0:
            raise InputError(f"{path} holds a {covariance} that is not symmetric, or has negative variances: make it again")
    if "features" in arrays and arrays["features"].shape[1:] != arrays["mu"].shape:
        raise InputError(
            f"{path} holds features {list(arrays['features'].shape)} but mu of width {len(arrays['mu'])}: make it again"
        )


def load(path: Path) -> Summary | None:
    """Return the statistics of an .npz, None if it contains none. Raises InputError if it is corrupt."""
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("no zip archive")
        with np.load(path) as file:
            if "mu" not in file or "sigma" not in file:
                return None
            arrays = _arrays(file)
            about = json.loads(str(file["about"])) if "about" in file else {}
        if not (isinstance(about, dict) and isinstance(about.get("features", {}), dict)):
            raise ValueError("its `about` is of another shape")
        if not isinstance(about.get("images", 0), int):
            raise ValueError(f"its number of images is {about['images']!r}")
    except BAD_NPZ as error:
        raise InputError(f"{path} cannot be read as an .npz: {error}: it is damaged or not one; fetch or make it again") from error
    _check(arrays, path)
    return Summary(**arrays, about=about)
