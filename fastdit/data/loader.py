"""Images online: from the archives of an index, decoded, cropped and resized by DALI. B batch, S image size in pixels.

The graph: encoded bytes -> decode (nvJPEG on CUDA, libjpeg-turbo on a CPU) -> one antialiased cubic resize of the crop -> mirror,
[-1,1]. Order, crops and flips are the same everywhere; pixels are equal to the bit on CPUs, nvJPEG is another decoder.
"""

import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.config import Config, InputError
from fastdit.data.archives import BadImage, decode
from fastdit.data.index import Index
from fastdit.data.order import Order, center_crops, check_classes
from fastdit.distributed import World

AHEAD = 4  # batches whose bytes are read ahead, each in a thread of its own


def _threads(wanted: int | None) -> int:
    """DALI threads of this rank: as asked, or the cores shared by the node's ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return wanted or max(1, len(os.sched_getaffinity(0)) // ranks)


def to_torch(images, device: torch.device) -> Tensor:
    """A copy of a batch that DALI made, in memory of torch's own: DALI writes to its buffers again while it runs ahead."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    images = images.as_tensor()
    batch = torch.empty(images.shape(), dtype=torch.float32, device=device)
    stream = {"cuda_stream": torch.cuda.current_stream(device)} if device.type == "cuda" else {}
    feed_ndarray(images, batch, **stream)
    return batch


class Decoder:
    """Batches of an index' images, in order of their positions, decoded ahead.

    An image that cannot be read or decoded is named once, and the next image of the index takes its place, its label, crop and flip
    too, here and whenever it comes up again: a function of the files alone, so ranks and resumed runs agree.
    """

    def __init__(
        self,
        index: Index,
        rows: np.ndarray,
        choose: Callable[[int], tuple[np.ndarray, int]],
        cut: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
        batch_size: int,
        size: int,
        device: torch.device,
        threads: int | None,
        max_bad_files: int,
    ) -> None:
        """choose(position) -> images int64 [B] (elements of rows) and epoch; cut(images, epoch) -> start, end fp32 [B,2] in pixels
        of the source, mirror int32 [B]; both are called in threads. size: S. Raises InputError when DALI is missing."""
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise InputError("reading images needs DALI: pip install nvidia-dali-cuda130") from error
        self.index, self.rows, self.choose, self.cut = index, rows, choose, cut
        self.batch_size, self.size, self.device = batch_size, size, device
        self.threads, self.max_bad_files = _threads(threads), max_bad_files
        self.bad: set[int] = set()
        self.position, self._pipeline, self._pool = -1, None, ThreadPoolExecutor(AHEAD)

    def seek(self, position: int) -> None:
        """Make `position` the next batch."""
        if position != self.position:
            self.position = position
            self._build()

    def next(self) -> tuple[Tensor, np.ndarray]:
        """Images fp32 [B,3,S,S] in [-1,1] on the device, and which they are. Raises InputError after max_bad_files bad ones."""
        while True:
            try:
                (images,) = self._pipeline.run()
            except RuntimeError as error:
                self._note_bad_files(error)
                self._build()  # DALI calls a pipeline that failed invalid
            else:
                self.position += 1
                return to_torch(images, self.device), self._chosen.popleft()

    def _pipe(self, batch_size: int) -> "nvidia.dali.Pipeline":  # noqa: F821 (imported where it is used)
        from nvidia.dali import Pipeline

        gpu = self.device.index if self.device.type == "cuda" else None
        return Pipeline(batch_size, self.threads, gpu, prefetch_queue_depth=2)

    def _decoded(self, encoded):
        from nvidia.dali import fn, types

        # libjpeg-turbo's way of upsampling colours
        mixed = {"device": "mixed", "jpeg_fancy_upsampling": True} if self.device.type == "cuda" else {"device": "cpu"}
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False, **mixed)

    def _build(self) -> None:
        from nvidia.dali import fn, types

        self._chosen: deque[np.ndarray] = deque()
        self._reads: deque[Future] = deque()
        self._read_next = self.position
        for _ in range(AHEAD):
            self._read_ahead()
        pipe = self._pipe(self.batch_size)
        with pipe:
            encoded, start, end, mirror = fn.external_source(
                self._feed, num_outputs=4, dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32], ndim=[1, 1, 1, 0]
            )
            size = {"size": [self.size, self.size], "roi_start": start, "roi_end": end}
            images = fn.resize(self._decoded(encoded), interp_type=types.INTERP_CUBIC, antialias=True, **size)
            scale = {"mean": [127.5] * 3, "std": [127.5] * 3, "mirror": mirror}
            pipe.set_outputs(fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **scale))
        pipe.build()
        self._pipeline = pipe

    def _read_ahead(self) -> None:
        self._reads.append(self._pool.submit(self._read, self._read_next))
        self._read_next += 1

    def _read(self, position: int) -> tuple:
        images, epoch = self.choose(position)
        images = np.array([self._standing_in(int(image)) for image in images])
        return images, [self._bytes(image) for image in images], *self.cut(images, epoch)

    def _feed(self) -> tuple:
        """DALI's inputs of the next batch."""
        images, encoded, start, end, mirror = self._reads.popleft().result()
        self._read_ahead()
        self._chosen.append(images)
        return encoded, start, end, mirror

    def _standing_in(self, image: int) -> int:
        """The image itself, or the next one of the index that is not known to be bad."""
        while image in self.bad:
            image = (image + 1) % len(self.rows)
        return image

    def _bytes(self, image: int) -> np.ndarray:
        try:
            return np.frombuffer(self.index.read(self.rows[image]) or b"\0", np.uint8)
        except OSError:
            return np.zeros(1, np.uint8)  # DALI refuses it, and then it is looked into

    def _note_bad_files(self, error: RuntimeError) -> None:
        """Find what made DALI fail, in this batch or those that it has begun. Raises `error` where no file is at fault."""
        found = False
        for position in range(self.position, self.position + AHEAD):
            for image in self.choose(position)[0]:
                image = self._standing_in(int(image))
                reason = self._fault(image)
                if reason:
                    found = True
                    self.bad.add(image)
                    name, instead = self.index.name(self.rows[image]), self.index.name(self.rows[self._standing_in(image)])
                    tqdm.write(f"fastdit: warning: bad file {name}: {reason}; {instead} takes its place", file=sys.stderr)
                    if len(self.bad) > self.max_bad_files:
                        raise InputError(
                            f"more than data.max_bad_files={self.max_bad_files} files of {self.index.folder} cannot be decoded, "
                            f"the last is {name}: run `fastdit prepare` again, or mend the files"
                        )
            if found:
                return
        raise error

    def _fault(self, image: int) -> str | None:
        """Why an image cannot be decoded, or None when it can."""
        from nvidia.dali import fn, types

        try:
            data = self.index.read(self.rows[image])
        except OSError as error:
            return str(error)
        pipe = self._pipe(1)
        with pipe:
            encoded = fn.external_source(lambda: [np.frombuffer(data or b"\0", np.uint8)], dtype=types.UINT8, ndim=1)
            pipe.set_outputs(self._decoded(encoded))
        try:
            pipe.build()
            pipe.run()
            return None
        except RuntimeError as error:
            try:
                decode(data)
            except BadImage as why:
                return str(why)
            return str(error).strip().split("\n")[0]


class ImageLoader:
    """Training batches from an index."""

    channels = 3

    def __init__(self, index: Index, config: Config, world: World) -> None:
        """Raises InputError when the index does not fit the config."""
        data, rows = config.data, index.rows("train")
        check_classes(len(index.classes), config)
        self.class_names = index.class_names or index.classes
        self.order, self.data, self.device = Order(len(rows), config, world), data, world.device
        self.labels, self.heights, self.widths = (np.array(rows[key]) for key in ("label", "height", "width"))
        self.decoder = Decoder(
            index,
            rows,
            self._choose,
            self._cut,
            config.train.batch_size,
            data.image_size,
            world.device,
            data.threads,
            data.max_bad_files,
        )

    def _choose(self, position: int) -> tuple[np.ndarray, int]:
        return self.order.images(*divmod(position, self.order.accumulation))

    def _cut(self, images: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        heights, widths = self.heights[images], self.widths[images]
        if self.data.crop == "random":
            start, end = self.order.random_crops(images, epoch, heights, widths)
        else:
            start, end = center_crops(heights, widths, self.data.image_size)
        flips = self.order.flips(torch.from_numpy(images), epoch).numpy() & self.data.flip
        return start, end, flips.astype(np.int32)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Images fp32 [B,3,S,S] in [-1,1] and labels int64 [B]."""
        self.decoder.seek(step * self.order.accumulation + micro)
        images, chosen = self.decoder.next()
        return images, torch.from_numpy(self.labels[chosen].astype(np.int64)).to(self.device, non_blocking=True)
