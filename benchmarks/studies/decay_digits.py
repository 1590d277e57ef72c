"""A constant learning rate with a decay phase of its own against a cosine of the same length, on the built-in digits.

    python -m benchmarks.studies.decay_digits [--seeds 2] [--samples 2000]

"constant": 400 steps. "decay": 100 steps more from its checkpoint, with train.decay_steps=100. "cosine": 500 steps. All with the
default settings besides. Fréchet distance of unguided samples (dpm++, 10 steps) to the training digits, of raw and EMA weights.
The runs are kept in --out: a second call resumes them.
"""

import sys
from pathlib import Path

import torch

from benchmarks import results_csv
from fastdit import distributed
from fastdit.config import parse
from fastdit.data.builtin import mnist5k
from fastdit.evaluation import command as evaluate_command
from fastdit.evaluation import features, image_sets, metrics
from fastdit.sampling.sampler import Sampler
from fastdit.training.loop import train

CSV = "decay_digits"
SAMPLER = {"steps": 10, "solver": "dpm++", "guidance": 0.0}
STEPS, DECAY = 400, 100
RUNS = {  # by name: settings, in an order in which each begins where it has to
    "constant": [f"train.total_steps={STEPS}"],
    "decay": [f"train.total_steps={STEPS + DECAY}", f"train.decay_steps={DECAY}", "train.resume={out}/constant_{seed}"],
    "cosine": [f"train.total_steps={STEPS + DECAY}", "train.schedule=cosine"],
}


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, None))
    parser.add_argument("--out", type=Path, default=Path("runs/decay"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="samples per row (default: %(default)s)")
    options = results_csv.parse(parser, words)
    world = distributed.world_of_this_process()
    network = features.load("digits", torch.device("cpu"))
    network.probe((32, 32, 1))
    summary = lambda source: evaluate_command.summarize(source, network, world, "features")
    reference = summary(image_sets.of_array(*mnist5k("train"), {}))
    rows = []
    for seed in range(options.seeds):
        for name, settings in RUNS.items():
            common = [f"train.out={options.out}", f"train.name={name}_{seed}", f"train.seed={seed}", "train.sample_steps=0"]
            run = train(parse(None, [*common, *(word.format(out=options.out, seed=seed) for word in settings)]))
            for weights in ("ema", "raw"):
                drawn = image_sets.of_checkpoint(Sampler(run, weights, "cpu", "fp32"), options.samples, "balanced", SAMPLER, seed)
                values = metrics.scalars(metrics.compare(summary(drawn), reference, world.device))
                row = {"run": name, "seed": seed, "weights": weights, "samples": options.samples}
                rows.append(row | {key: float(f"{value:.5g}") for key, value in values.items()})
                print(results_csv.line(rows[-1]), flush=True)
    results_csv.write(options.csv, rows, allow_dirty=options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
