"""What Muon costs: CPU seconds of an optimizer step with AdamW and with Muon, beside those of the gradients, on one rank.

    python -m benchmarks.studies.muon_step [--rounds 7]

Both clip, update one moving average, and round the masters to bf16 if the device has fast bf16 matmuls, in which Newton-Schulz runs
then. They take turns, after a forward and backward pass. Rows have medians of CPU milliseconds, which other work on the machine
changes less than those on the wall clock, the optimizer's share of a training step, which falls with the tokens per step, and the
FLOPs of the Newton-Schulz iterations.
"""

import sys

import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, THREADS, quantiles, timed
from fastdit import flow, progress
from fastdit.config import Config, parse
from fastdit.device import DTYPES, precision
from fastdit.model import DiT
from fastdit.training.ema import ShardedEma
from fastdit.training.engine import Fragment
from fastdit.training.optimizer import build, muon_share

CSV = "muon_step"
OPTIMIZERS = ("adamw", "muon")
CASES = (("nano/4", 32, 32), ("S/2", 16, 32))  # preset, images per step, latent side


class Run:
    """A model on one rank with an optimizer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(0)
        self.model = DiT(config.model).to(DEVICE)
        _, self.optimizer = build(config, self.model, sharded=False)
        masters = [Fragment(str(i), 0, m.detach().view(-1)) for i, m in enumerate(self.optimizer.masters)]
        self.ema = ShardedEma(masters, config.train.ema_decay, optimizer=self.optimizer)
        self.model.to(DTYPES[config.train.precision]).train()

    def gradients(self) -> None:
        model, B = self.config.model, self.config.train.batch_size
        images = torch.randn(B, model.in_channels, model.input_size, model.input_size, device=DEVICE)
        ids, labels = torch.arange(B, device=DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE)
        flow.losses(self.model, images, labels, ids, self.config.flow, seed=0, null=model.num_classes).total.mean().backward()

    def step(self) -> None:
        self.ema.announce()
        self.optimizer.step()
        if self.optimizer.finish_step():
            self.ema.update()


def configs(preset: str, batch: int, input_size: int) -> dict[str, Config]:
    """Return the settings of a case by optimizer."""
    words = [f"model.preset={preset}", f"model.input_size={input_size}", f"train.batch_size={batch}"]
    made = (parse(None, [*words, f"train.precision={precision('auto', DEVICE)}", f"train.optimizer={name}"]) for name in OPTIMIZERS)
    return dict(zip(OPTIMIZERS, made, strict=True))


def measure(runs: dict[str, Run], rounds: int, label: str) -> dict[str, list[tuple[float, float]]]:
    """Return CPU seconds of (gradients, step) in each round by optimizer, after one round that is not counted."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with progress.progress_bar(rounds + 1, description=label, unit="round") as bar:
        for turn in range(rounds + 1):
            for name, run in runs.items() if turn % 2 else reversed(runs.items()):
                spent = timed(run.gradients).cpu, timed(run.step).cpu
                if turn:
                    samples[name].append(spent)
            bar.update()
    return samples


def main(words: list[str] | None = None) -> int:
    parser = results_csv.parser(__doc__, results_csv.path_of(CSV, DEVICE))
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each optimizer (default: %(default)s)")
    options = results_csv.parse(parser, words)
    rows = []
    for preset, batch, input_size in CASES:
        case = configs(preset, batch, input_size)
        for name, samples in measure({name: Run(config) for name, config in case.items()}, options.rounds, preset).items():
            gradients, step = (quantiles([each[i] for each in samples])[0] for i in (0, 1))
            model = case[name].model
            rows.append(
                {
                    "preset": preset, "precision": case[name].train.precision, "optimizer": name, "images": batch,
                    "tokens": batch * (model.input_size // model.patch_size) ** 2, "threads": THREADS,
                    "gradients_cpu_ms": f"{gradients * 1e3:.1f}", "step_cpu_ms": f"{step * 1e3:.1f}",
                    "share": f"{step / (gradients + step):.3f}", "gflop": f"{muon_share(case[name]).flops / 1e9:.1f}",
                    "rounds": options.rounds,
                }
            )  # fmt: skip
            print(results_csv.line(rows[-1]))
    results_csv.write(options.csv, rows, DEVICE, options.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
