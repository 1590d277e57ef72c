"""Images online: read from the archives of an index, decoded, cropped and resized by DALI. B batch size, S image size in pixels.

The DALI graph: encoded bytes -> decode (nvJPEG on CUDA, libjpeg-turbo on a CPU) -> one antialiased cubic resize of the crop ->
mirror, scale to [-1,1]. What DALI would not decode as pixels.load does, the reading threads decode by it. EXIF orientation is
part of the crop: it is given in stored pixels, from its end to its start along an axis that is mirrored, and a transposed image is
transposed at the end. Order, crops and flips are the same everywhere; pixels are bitwise equal on all CPUs, while nvJPEG rounds in
its own way.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config, InputError
from fastdit.data import pixels
from fastdit.data.imagenet import are_imagenet
from fastdit.data.index import Index
from fastdit.data.order import Order, center_crops, check_classes
from fastdit.data.pixels import BadImage
from fastdit.distributed import World
from fastdit.progress import warn

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

AHEAD = 4  # batches whose bytes are read ahead, each in its own thread


def _threads(wanted: int | None) -> int:
    """Return the number of DALI threads of this rank: `wanted`, or the cores shared by the node's ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return wanted or max(1, len(os.sched_getaffinity(0)) // ranks)


def applies_exif(setting: str, index: Index) -> bool:
    """Return whether EXIF orientations are applied to the images of an index under data.exif="auto" | "ignore".

    ImageNet's stay as everybody trains on them.
    """
    return setting == "auto" and not are_imagenet(index.classes)


def to_torch(images, device: torch.device) -> Tensor:
    """Copy a batch of DALI's to torch's own memory: DALI reuses its buffers while it runs ahead."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    images = images.as_tensor()
    batch = torch.empty(images.shape(), dtype=torch.float32, device=device)
    stream = {"cuda_stream": torch.cuda.current_stream(device)} if device.type == "cuda" else {}
    feed_ndarray(images, batch, **stream)
    return batch


class Decoder:
    """Batches of an index's images in the order of their positions, decoded ahead.

    A position counts batches, for example micro-steps of a run. An image that cannot be read or decoded is reported once, and the
    next image of the index is used instead, with its own label, crop and flip, here and whenever it comes up again: a function of
    the files only, so ranks and resumed runs agree.
    """

    def __init__(
        self,
        index: Index,
        rows: np.ndarray,
        images_of: Callable[[int], tuple[np.ndarray, int]],
        crops_of: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
        batch_size: int,
        size: int,
        device: torch.device,
        threads: int | None,
        max_bad_files: int,
        exif: bool,
    ) -> None:
        """index, rows: an index and a split of it.

        images_of: position -> (images int64 [B], elements of rows; epoch). crops_of: (images, epoch) -> (start, end, fp32 [B,2],
        (row, column) in pixels of pixels.upright_sizes; mirror int32 [B]). Both are called in threads, and again after a bad file.
        batch_size: B; size: S; threads: of DALI, None: the rank's share of the cores; max_bad_files: one more ends the run; exif:
        whether EXIF orientations are applied.
        Raises InputError if DALI is missing.
        """
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise InputError("reading images needs DALI: pip install nvidia-dali-cuda130") from error
        self.index = index
        self.rows = rows
        self.images_of = images_of
        self.crops_of = crops_of
        self.batch_size = batch_size
        self.size = size
        self.device = device
        self.threads = _threads(threads)
        self.max_bad_files = max_bad_files
        self.by_pillow = (rows["flags"] & pixels.PILLOW) > 0
        self.turns = pixels.TURNS[rows["flags"] & pixels.ORIENTATION] & exif
        self.upright = np.stack(pixels.upright_sizes(rows, exif), 1).astype(np.float32)
        self.bad: set[int] = set()
        self.position = -1
        self._pool = ThreadPoolExecutor(AHEAD)

    def seek(self, position: int) -> None:
        """Make `position` the next batch."""
        if position != self.position:
            self.position = position
            self._build()

    def next(self) -> tuple[Tensor, np.ndarray]:
        """Return images fp32 [B,3,S,S] in [-1,1] on the device, and which elements of rows they are, int64 [B].

        Raises InputError if there are more than max_bad_files bad files.
        """
        while True:
            try:
                (images,) = self._pipeline.run()
            except RuntimeError as error:
                self._note_bad_files(error)
                self._build()  # DALI calls a pipeline that failed invalid
            else:
                self.position += 1
                images, chosen = to_torch(images, self.device), self._images.popleft()
                for i in np.flatnonzero(self.turns[chosen, 0]):
                    images[i] = images[i].mT.clone()
                return images, chosen

    def _pipe(self, batch_size: int) -> "Pipeline":
        from nvidia.dali import Pipeline

        gpu = self.device.index if self.device.type == "cuda" else None
        return Pipeline(batch_size, self.threads, gpu, prefetch_queue_depth=2)

    def _decoded(self, encoded: "DataNode") -> "DataNode":
        """The decoding node of a DALI graph."""
        from nvidia.dali import fn, types

        # fancy upsampling interpolates chroma as libjpeg-turbo does
        cuda = self.device.type == "cuda"
        options: dict[str, Any] = {"device": "mixed", "jpeg_fancy_upsampling": True} if cuda else {"device": "cpu"}
        return fn.decoders.image(encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False, **options)

    def _build(self) -> None:
        """Build a pipeline that begins at the current position, and start to read ahead."""
        from nvidia.dali import fn, types

        dtypes = types.DALIDataType
        self._images: deque[np.ndarray] = deque()
        self._reads: deque[Future] = deque()
        self._read_next = self.position
        for _ in range(AHEAD):
            self._read_ahead()
        pipe = self._pipe(self.batch_size)
        with pipe:
            encoded, start, end, mirror = fn.external_source(
                self._feed, num_outputs=4, dtype=[dtypes.UINT8, dtypes.FLOAT, dtypes.FLOAT, dtypes.INT32], ndim=[1, 1, 1, 0]
            )
            size = {"size": [self.size, self.size], "roi_start": start, "roi_end": end}
            images = fn.resize(self._decoded(encoded), interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True, **size)
            images = cast("DataNode", images)  # its annotation covers the further outputs of save_attrs=True
            scale = {"mean": [127.5] * 3, "std": [127.5] * 3, "mirror": mirror}
            pipe.set_outputs(fn.crop_mirror_normalize(images, dtype=dtypes.FLOAT, output_layout="CHW", **scale))
        pipe.build()
        self._pipeline = pipe

    def _read_ahead(self) -> None:
        self._reads.append(self._pool.submit(self._read, self._read_next))
        self._read_next += 1

    def _read(self, position: int) -> tuple:
        """Read a batch: its images after replacement of bad ones, their bytes, and the crops."""
        images, epoch = self.images_of(position)
        images = np.array([self._replacement(int(image)) for image in images])
        return images, [self._bytes(image) for image in images], *self._stored(images, *self.crops_of(images, epoch))

    def _stored(self, images: np.ndarray, start: np.ndarray, end: np.ndarray, mirror: np.ndarray) -> tuple:
        """Return crops of upright images as DALI's (start, end, mirror) of the stored pixels: an axis runs backwards from start to
        end where it is mirrored."""
        transposed, mirrored, flipped = self.turns[images].T[..., None]
        mirror_first = np.concatenate((np.zeros_like(transposed), transposed & (mirror[:, None] > 0)), 1)  # columns become rows
        start, end = np.where(mirror_first, end, start), np.where(mirror_first, start, end)
        backwards = np.concatenate((flipped, mirrored), 1)
        start, end = (np.where(backwards, self.upright[images] - point, point) for point in (start, end))
        start, end = (np.where(transposed, point[:, ::-1], point) for point in (start, end))
        return start, end, mirror * ~transposed[:, 0]

    def _feed(self) -> tuple:
        """Return DALI's inputs of the next batch."""
        images, encoded, start, end, mirror = self._reads.popleft().result()
        self._read_ahead()
        self._images.append(images)
        return encoded, start, end, mirror

    def _replacement(self, image: int) -> int:
        """Return the image itself, or the next one of the index that is not known to be bad."""
        while image in self.bad:
            image = (image + 1) % len(self.rows)
        return image

    def _encoded(self, image: int) -> bytes:
        """Return the bytes that DALI decodes, of an image that it cannot as a portable pixmap. Raises BadImage."""
        data = self.index.read(self.rows[image])
        if not self.by_pillow[image]:
            return data or b"\0"
        picture = pixels.load(data, exif=False)
        return b"%s %d %d 255\n" % (b"P5" if picture.mode == "L" else b"P6", *picture.size) + picture.tobytes()

    def _bytes(self, image: int) -> np.ndarray:
        try:
            return np.frombuffer(self._encoded(image), np.uint8)
        except BadImage:
            return np.zeros(1, np.uint8)  # not an image: DALI fails, and `_note_bad_files` names the file

    def _note_bad_files(self, error: RuntimeError) -> None:
        """Find the files that made DALI fail, in this batch or those that it has begun. Raises `error` if no file is at fault."""
        any_bad = False
        for position in range(self.position, self.position + AHEAD):
            for image in self.images_of(position)[0]:
                image = self._replacement(int(image))
                reason = self._fault(image)
                if reason:
                    any_bad = True
                    self.bad.add(image)
                    name, instead = self.index.name(self.rows[image]), self.index.name(self.rows[self._replacement(image)])
                    warn(f"bad file {name}: {reason}; {instead} takes its place")
                    if len(self.bad) > self.max_bad_files:
                        raise InputError(
                            f"more than data.max_bad_files={self.max_bad_files} files of {self.index.folder} cannot be decoded, "
                            f"the last is {name}: run `fastdit prepare` again, or repair the files"
                        )
            if any_bad:
                return
        raise error

    def _fault(self, image: int) -> str | None:
        """Return why an image cannot be decoded, None if it can."""
        from nvidia.dali import fn, types

        try:
            data = self._encoded(image)
        except BadImage as error:
            return str(error)
        pipe = self._pipe(1)
        with pipe:
            encoded = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], dtype=types.DALIDataType.UINT8, ndim=1)
            pipe.set_outputs(self._decoded(encoded))
        try:
            pipe.build()
            pipe.run()
            return None
        except RuntimeError as error:
            try:
                pixels.decode(data)
            except BadImage as reason:
                return str(reason)
            return str(error).strip().split("\n")[0]


def center_crop_decoder(
    index: Index, rows: np.ndarray, batches: list[np.ndarray], batch_size: int, size: int, device: torch.device, max_bad_files: int,
    exif: str = "auto",
) -> Decoder:  # fmt: skip
    """Return a Decoder of given batches, center-cropped to `size` pixels and not mirrored, at the first of them.

    batches: elements of rows, int64 [b] with 1 <= b <= batch_size: a shorter batch is padded with its last image; exif: data.exif.
    Raises InputError if DALI is missing.
    """
    upright = applies_exif(exif, index)
    heights, widths = pixels.upright_sizes(rows, upright)

    def images_of(position: int) -> tuple[np.ndarray, int]:
        images = batches[min(position, len(batches) - 1)]  # it is asked for batches behind the last too, to read ahead
        return np.concatenate((images, np.full(batch_size - len(images), images[-1]))), 0

    def crops_of(images: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return *center_crops(heights[images], widths[images], size), np.zeros(len(images), np.int32)

    decoder = Decoder(index, rows, images_of, crops_of, batch_size, size, device, None, max_bad_files, upright)
    decoder.seek(0)
    return decoder


def grey(images: Tensor) -> Tensor:
    """Return the luma fp32 [B,1,S,S] of RGB images fp32 [B,3,S,S] (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    return blue + 0.299 * (red - blue) + 0.587 * (green - blue)  # of grey pixels, exactly their value


class ImageLoader:
    """Training batches of an index."""

    channels: int
    class_names: list[str] | None
    manifest: dict | None = None

    def __init__(self, index: Index, config: Config, world: World) -> None:
        """Raises InputError if the index does not fit the config."""
        data, rows = config.data, index.rows("train")
        check_classes(len(index.classes), config, world)
        self.class_names = index.class_names or index.classes
        self.order = Order(len(rows), config, world)
        self.channels = 1 if data.grey else 3
        self.data = data
        self.device = world.device
        self.labels = np.array(rows["label"])
        self.class_counts = np.bincount(self.labels, minlength=len(index.classes)).tolist()
        self.digest = index.digest("train")
        exif = applies_exif(data.exif, index)
        self.heights, self.widths = pixels.upright_sizes(rows, exif)
        self.decoder = Decoder(
            index, rows, self._images_of, self._crops_of, config.train.batch_size, data.image_size, world.device, data.threads,
            data.max_bad_files, exif,
        )  # fmt: skip

    def _images_of(self, position: int) -> tuple[np.ndarray, int]:
        return self.order.images(*divmod(position, self.order.accumulation))

    def _crops_of(self, images: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        heights, widths = self.heights[images], self.widths[images]
        if self.data.crop == "random":
            start, end = self.order.random_crops(images, epoch, heights, widths)
        else:
            start, end = center_crops(heights, widths, self.data.image_size)
        flips = self.order.flips(torch.from_numpy(images), epoch).numpy() & self.data.flip
        return start, end, flips.astype(np.int32)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return images fp32 [B,3 or 1,S,S] in [-1,1] and labels int64 [B], both on the device."""
        self.decoder.seek(step * self.order.accumulation + micro)
        images, decoded = self.decoder.next()
        images = grey(images) if self.data.grey else images
        return images, torch.from_numpy(self.labels[decoded].astype(np.int64)).to(self.device, non_blocking=True)
