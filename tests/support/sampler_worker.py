"""One of several ranks that share the samples of a run: writes its own to RANK.npz, and rank 0 all of them to all.npz.

Arguments: folder with the run `run`, number of samples, images per batch (0: the sampler's choice).
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastdit.distributed import World
from fastdit.sampling.sampler import Sampler


def main(folder: Path, count: int, at_once: int) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))
    sampler = Sampler(folder / "run", device="cpu")
    labels, settings = torch.arange(count) % 10, sampler.settings(steps=2, solver="sde")
    options = {"world": world, "at_once": at_once or None}
    batches = list(sampler.stream(labels, 5, settings, **options))
    ids = [i for batch, _ in batches for i in batch]
    images = np.concatenate([images for _, images in batches]) if batches else np.empty(0)
    np.savez(folder / f"{rank}.npz", ids=ids, images=images, batches=[len(batch) for batch, _ in batches])
    everything = sampler.draw(labels, 5, settings, **options)
    assert (everything is not None) == (rank == 0)
    if rank == 0:
        np.save(folder / "all.npy", everything)
    dist.destroy_process_group()


main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
