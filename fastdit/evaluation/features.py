"""Feature networks, from images to the vectors that metrics compare. B batch size, S image size, C channels, d feature width.

"digits" is the classifier of the built-in digits, anything else a TorchScript file whose interface is one of PREPROCESSES:
    inception     that of inception-2015-12-05.pt, net(images uint8 [B,3,S,S], return_features=True) -> fp32 [B,d], with its last
                  Linear named `output`
    imagenet224   net(images fp32 [B,3,224,224]) -> fp32 [B,d] of `imagenet224`, such as an exported DINOv2
Networks run in fp32 with TF32 off, on batches of one shape, the last of which is filled up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import InputError
from fastdit.evaluation import digit_classifier
from fastdit.evaluation.metrics import Outputs
from fastdit.files import sha256

BATCH = 100  # images per call of the network
PREPROCESSES = ("inception", "imagenet224")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in [0,1]
IMAGENET_STD = (0.229, 0.224, 0.225)
SPATIAL = 7  # channels of a spatial feature map that sFID uses, as in the ADM evaluator


@contextmanager
def full_precision() -> Iterator[None]:
    """Run the block with fp32 matmuls and convolutions, without TF32."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class FeatureNetwork:
    """A network from images to features.

    name: "digits" or the path of the file.
    preprocess: one of PREPROCESSES, None for digits.
    sha256: hash of the file of the weights.
    widths: widths of features, probabilities and spatial features (0: none), set by `probe`.
    knows_classes: whether the probabilities are of the classes of the samples.
    """

    def __init__(
        self, compute: Callable[[Tensor], Outputs], path: Path, name: str, device: torch.device, preprocess: str | None = None
    ) -> None:
        """compute: function from images uint8 [BATCH,C,S,S] on `device` to Outputs; path: file of the weights."""
        self._compute = compute
        self.name = name
        self.preprocess = preprocess
        self.sha256 = sha256(path)
        self.device = device
        self.knows_classes = False
        self.widths = (0, 0, 0)

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Outputs:
        with full_precision():
            return self._compute(images)

    def probe(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the widths of features, probabilities and spatial features (0: none) for images of shape (S, S, C).

        Raises InputError if the network does not take such images.
        """
        rows, columns, channels = shape
        try:
            outputs = self._batch(torch.zeros(BATCH, channels, rows, columns, dtype=torch.uint8, device=self.device))
        except (RuntimeError, AttributeError) as error:
            last = str(error).strip().split("\n")[-1]
            raise InputError(f"feature network {self.name} fails on images of {rows}x{columns}x{channels}: {last}") from error
        if any(o is not None and (o.ndim != 2 or len(o) != BATCH or not o.shape[1]) for o in outputs):
            raise InputError(
                f"feature network {self.name} must give one vector per image, but gives {list(outputs.features.shape)}"
            )
        features, probabilities, spatial = (0 if o is None else o.shape[1] for o in outputs)
        self.widths = (features, probabilities, spatial)
        return self.widths

    def __call__(self, images: np.ndarray) -> Iterator[Outputs]:
        """Yield the Outputs of images uint8 [n,S,S,C], at most BATCH at a time."""
        for first in range(0, len(images), BATCH):
            part = torch.from_numpy(np.ascontiguousarray(images[first : first + BATCH])).permute(0, 3, 1, 2).to(self.device)
            padded = F.pad(part, (0, 0, 0, 0, 0, 0, 0, BATCH - len(part)))
            vectors, *others = self._batch(padded)
            yield Outputs(vectors[: len(part)], *(None if o is None else o[: len(part)] for o in others))

    def about(self) -> dict:
        """Return what results say of the network, as JSON types."""
        return {
            "network": self.name, "sha256": self.sha256, "preprocess": self.preprocess, "width": self.widths[0], "dtype": "fp32",
            "tf32": False, "batch": BATCH,
        }  # fmt: skip


def _digits(device: torch.device) -> FeatureNetwork:
    net = digit_classifier.load().to(device)

    def compute(images: Tensor) -> Outputs:
        if images.shape[1:] != (1, 32, 32):
            raise RuntimeError("it takes 32x32x1")
        features, logits = net(images)
        return Outputs(features, logits.softmax(1))

    network = FeatureNetwork(compute, digit_classifier.WEIGHTS, "digits", device)
    network.knows_classes = True
    return network


def _prefix(net: torch.jit.ScriptModule, module: str) -> list[Callable]:
    """Return the submodules up to `module`, such as layers.mixed_6.conv: those of `layers` before it, then itself."""
    chain, parent = [], net
    names = module.split(".")
    for depth, name in enumerate(names):
        children = dict(parent.named_children())
        if name not in children:
            raise InputError(f"--spatial {module}: the network has no {name} there, but {', '.join(children) or 'nothing'}")
        if depth == 1:  # the layers before it; inside a block, branches lie side by side
            chain += [child for other, child in list(children.items())[: list(children).index(name)]]
        parent = children[name]
    return [*chain, parent]


def _resized(images: Tensor) -> Tensor:
    """Return images uint8 [B,3,S,S] as fp32 [B,3,299,299] around 0: bilinear by corners, as TensorFlow 1 resized for Inception."""
    count, _, rows, columns = images.shape
    at = lambda size: (torch.arange(299, device=images.device) * size / 299 + 0.5) * 2 / size - 1  # align_corners=False
    grid = torch.stack(torch.meshgrid(at(columns), at(rows), indexing="xy"), -1)
    resized = F.grid_sample(images.float(), grid.expand(count, -1, -1, -1), padding_mode="border", align_corners=False)
    return (resized - 128) / 128


def imagenet224(images: Tensor) -> Tensor:
    """Return images uint8 [B,3,S,S] as fp32 [B,3,224,224] for networks of ImageNet: cubic with antialiasing, normalized.

    Rounded to 8 bits after each axis, as Pillow in the DINOv2 evaluation of arXiv:2306.04675.
    """
    levels = images.float()
    for size in ((images.shape[2], 224), (224, 224)):
        levels = F.interpolate(levels, size, mode="bicubic", antialias=True, align_corners=False)
        levels = (levels + 0.5).floor().clamp(0, 255)
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (levels / 255 - mean) / std


def _torchscript(path: Path, spatial: str | None, preprocess: str, device: torch.device) -> FeatureNetwork:
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0].partition(". ")[0]
        raise InputError(f"--features {path} is neither 'digits' nor a TorchScript file that can be read: {first}") from error
    weight = getattr(getattr(net, "output", None), "weight", None)
    chain = _prefix(net, spatial) if spatial else None

    def compute(images: Tensor) -> Outputs:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if preprocess == "imagenet224":
            return Outputs(net(imagenet224(images)).float())
        features = net(images, return_features=True).float()
        probabilities = None if weight is None else (features @ weight.float().T).softmax(1)  # no bias, as in the ADM evaluator
        maps = None
        if chain:
            maps = _resized(images)
            for layer in chain:
                maps = layer(maps)
            maps = maps[:, :SPATIAL].flatten(1).float()
        return Outputs(features, probabilities, maps)

    return FeatureNetwork(compute, path, str(path), device, preprocess)


def load(
    source: str, device: torch.device, wanted_sha256: str | None = None, spatial: str | None = None, preprocess: str | None = None
) -> FeatureNetwork:
    """Return the feature network of a source, "digits" or a TorchScript file.

    wanted_sha256: required SHA-256 of the file; spatial: submodule whose first SPATIAL channels sFID uses (unverified: not
    run on the real file); preprocess: one of PREPROCESSES (default: the first). Raises InputError if the file does not exist,
    cannot be read or has another SHA-256.
    """
    if spatial is not None and (source == "digits" or not spatial or preprocess == "imagenet224"):
        raise InputError(f"--spatial {spatial!r} must be a submodule of an Inception network of --features: leave it out")
    if preprocess is not None and source == "digits":
        raise InputError(f"--preprocess {preprocess} is for a TorchScript file of --features, not for 'digits': leave it out")
    path = digit_classifier.WEIGHTS if source == "digits" else Path(source)
    if not path.is_file():
        raise InputError(f"--features {source} is neither 'digits' nor a file: give the path of inception-2015-12-05.pt, say")
    digest = sha256(path)
    if wanted_sha256 and digest != wanted_sha256.lower():
        raise InputError(f"--features {source} has SHA-256 {digest}, not {wanted_sha256}: it is another or a damaged file")
    return _digits(device) if source == "digits" else _torchscript(path, spatial, preprocess or PREPROCESSES[0], device)
