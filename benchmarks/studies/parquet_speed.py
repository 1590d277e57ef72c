"""Images from Parquet files against the same images in tars: images per CPU second of `fastdit prepare` and of training batches.

    python -m benchmarks.studies.parquet_speed [--images 2000] [--rows 100] [--turns 5]

Photographs of about 500x375 pixels, in row groups of 100 as the Hub has them, from the page cache. prepare: to an index. Three
cases of batches of 32 images at 256 pixels, read and decoded by the loader: `in cache`, an epoch's order after all row groups have
been decoded, as of a data set of less than 512 MiB; `beyond cache`, the same without the cache, as of a data set of many times its
size; `file order`, as `fastdit encode` reads, from an empty cache. The two take turns. The CPU time is that of all threads: the
images per second are those of one core. 10 minutes on 2 cores.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute
import pyarrow.parquet  # noqa: F401 (both here, so that no timing has them)
import torch

from benchmarks import photographs, results_csv
from fastdit.data import parquet, prepare
from fastdit.data.index import Index, open_index
from fastdit.data.loader import center_crop_decoder
from fastdit.progress import progress_bar

CSV = "parquet_speed"
CLASSES, BATCH, SIZE = 10, 32, 256
CASES = {"in cache": 1 << 40, "beyond cache": 1, "file order": parquet.CACHE}  # bytes that the cache may take


def write_sources(folder: Path, count: int, rows: int) -> dict[str, Path]:
    """Write `count` photographs in the same order to a tar and to a Parquet file with row groups of `rows` images."""
    images = [photographs.encoded(image) for image in photographs.crops(count)]
    labels = [i % CLASSES for i in range(count)]
    (folder / "images.tar").write_bytes(
        photographs.tar_of({f"{label}/{i:06d}.jpg": data for i, (data, label) in enumerate(zip(images, labels, strict=True))})
    )
    photographs.write_parquet(folder / "images.parquet", images, labels, [str(i) for i in range(CLASSES)], rows)
    return {"tar": folder / "images.tar", "parquet": folder / "images.parquet"}


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of all threads of this process during a call."""
    before = time.process_time()
    work()
    return time.process_time() - before


def read_batches(index: Index, case: str, count: int) -> float:
    """Return the CPU seconds of `count` images in batches, in the order of a case."""
    parquet.CACHE = CASES[case]
    parquet.clear()
    rows = index.rows("train")
    if case == "in cache":
        for row in rows:
            index.read(row)
    order = np.arange(count) if case == "file order" else np.random.default_rng(0).permutation(len(rows))[:count]
    batches = np.array_split(order, max(1, count // BATCH))
    decoder = center_crop_decoder(index, rows, batches, max(map(len, batches)), SIZE, torch.device("cpu"), 0)
    return cpu_seconds(lambda: [decoder.next() for _ in batches])


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV))
    parser.add_argument("--images", type=int, default=2000, help="number of photographs (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=100, help="images per row group (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (default: %(default)s)")
    options = results_csv.parse(parser, words)
    with tempfile.TemporaryDirectory() as folder, progress_bar(options.turns, description="turns", unit="turn") as bar:
        sources = write_sources(Path(folder), options.images, options.rows)
        timings: dict[tuple[str, str], list[float]] = {}
        for turn in range(options.turns):
            for kind, source in list(sources.items())[:: -1 if turn % 2 else 1]:
                out = Path(folder) / f"{kind}-{turn}.index"
                timings.setdefault(("prepare", kind), []).append(cpu_seconds(lambda s=source, o=out: prepare.prepare([s], o)))
                index = open_index(out)
                for case in CASES:
                    timings.setdefault((case, kind), []).append(read_batches(index, case, options.images))
            bar.update()
        sizes = np.array(index.rows("train")["bytes"])
    result = []
    for case in ("prepare", *CASES):
        seconds = {kind: timings[case, kind] for kind in sources}
        ratios = [p / t for t, p in zip(seconds["tar"], seconds["parquet"], strict=True)]
        result.append({
            "case": case, "images": options.images, "rows_per_group": options.rows, "kb_per_image": f"{sizes.mean() / 1e3:.0f}",
            "turns": options.turns,
            **{f"{kind}_images_per_cpu_s": f"{options.images / statistics.median(seconds[kind]):.0f}" for kind in sources},
            "ratio": f"{statistics.median(ratios):.2f}", "ratio_min": f"{min(ratios):.2f}", "ratio_max": f"{max(ratios):.2f}",
        })  # fmt: skip
        print(results_csv.line(result[-1]))
    results_csv.write(options.csv, result, allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
