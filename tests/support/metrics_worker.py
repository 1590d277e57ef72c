"""One of several ranks that accumulate the statistics of the same features: rank 0 writes what came out."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastdit.distributed import World
from fastdit.evaluation import metrics


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))
    arrays = np.load(folder / "features.npz")
    x, p = (torch.from_numpy(arrays[key]) for key in ("x", "p"))
    statistics = metrics.Statistics(len(x), len(x), (x.shape[1], p.shape[1], 0), world.device)
    mine = torch.arange(len(x)).flip(0)[world.rank :: world.size]
    for ids in mine.split(17 + 4 * world.rank):
        statistics.update(ids, metrics.Outputs(x[ids], p[ids]))
    found = statistics.summary(world)
    if world.rank == 0:
        metrics.save(found, folder / "found.npz")
        (folder / "score.json").write_text(json.dumps(found.inception_score))

    dist.destroy_process_group()


main(Path(sys.argv[1]))
