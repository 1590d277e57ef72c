"""Images per second of a train step on a CPU: the eager reference, fastdit's model in a plain loop and under its DeepSpeed engine.

    python benchmarks/train_step.py [--rounds 9] [--threads 2] [--cases base S/2 wide] [--out benchmarks/results/train_step.csv]

Each is a process of its own, with the allocator settings it has in real life (`fastdit train` asks glibc for huge pages and for
keeping what is freed; the base script does not; "eager tuned" is the eager step with fastdit's). They take turns of three steps,
the order reversed every other round, on the same data, timesteps and noise. The bound: matmul and attention FLOPs over the rate
of `a @ b` in bf16, which the parent measures in every round. Peak memory is VmHWM of each process.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch
from torch import Tensor

from eager_reference import EagerDiT, comparable, fastdit_model, train_step
from fastdit import engine, flow, kernels, telemetry
from fastdit.cli import ALLOCATOR
from fastdit.config import Config, TrainConfig
from fastdit.model import native_bf16

# width, depth, heads, hidden, class width, batch; shape of the GEMM whose rate is the bound
CASES = {
    "base": ((384, 12, 6, 1536, 2048), 8, (2048, 384, 1536)),
    "S/2": ((384, 12, 6, 1024, None), 8, (2048, 384, 1536)),
    "wide": ((1088, 4, 17, 4352, 2048), 4, (1024, 1088, 8704)),
}
PROVIDERS = ("eager", "eager tuned", "plain", "engine")
OPTIMIZER_PARTS = 4
TURN = 3  # steps: the first finds the caches full of another process's data
LR, WEIGHT_DECAY = 1e-4, 0.01  # the base script's


def flops(width: int, depth: int, hidden: int, tokens: int = 256, patch: int = 16, class_width: int | None = None) -> float:
    """Of one image's forward and backward: 2·M·N·K of every matmul and 4·T²·H of attention, three times; the modulation's and the
    class vector's matmuls, once an image, included. The table lookup and the gradient of the latent are not."""
    block = 2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width
    once = 2 * (6 * depth + 2 + 1) * width**2 + 2 * (class_width or 0) * width
    return 3 * (depth * block + once + 4 * tokens * width * patch)


def batch(step: int, size: int) -> tuple[Tensor, ...]:
    """x0, labels, t and noise of a step: the same in every process."""
    ids = flow.sample_ids(step, 0, size, torch.device("cpu"))
    draw = lambda stream, shape: kernels.counter_normal(0, stream, ids, shape)
    labels = (kernels.counter_uniform(0, 103, ids, ()) * 1000).long()
    return draw(100, (4, 32, 32)), labels, draw(101, ()).sigmoid(), draw(102, (4, 32, 32))


def eager_worker(case: str):
    shape, size, _ = CASES[case]
    model = EagerDiT(comparable(*shape))
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    return lambda step: train_step(model, optimizer, *batch(step, size))


def velocity_loss(model, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return kernels.flow_matching_loss(model(kernels.flow_interpolate(x0, noise, t), t, labels), x0, noise).mean()


def plain_fp32_worker(case: str):
    """fp32 weights and torch's fused AdamW, no engine."""
    shape, size, _ = CASES[case]
    model = fastdit_model(EagerDiT(comparable(*shape)))
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)

    def run(step: int) -> float:
        loss = velocity_loss(model, *batch(step, size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def plain_worker(case: str):
    """bf16 weights with fp32 masters and torch's fused AdamW, no engine; in fp32 where bf16 is emulated."""
    if not native_bf16(torch.device("cpu")):
        return plain_fp32_worker(case)
    shape, size, _ = CASES[case]
    model = fastdit_model(EagerDiT(comparable(*shape)))
    masters = [p.detach().clone() for p in model.parameters()]
    model.bfloat16()
    parameters = list(model.parameters())
    # in parts, so that only a part of the gradients is there in fp32 at a time
    cuts = [len(masters) * i // OPTIMIZER_PARTS for i in range(OPTIMIZER_PARTS + 1)]
    parts = [(masters[a:b], parameters[a:b]) for a, b in itertools.pairwise(cuts)]
    optimizers = [torch.optim.AdamW(own, LR, weight_decay=WEIGHT_DECAY, fused=True) for own, _ in parts]

    def run(step: int) -> float:
        loss = velocity_loss(model, *batch(step, size))
        loss.backward()
        for optimizer, (own, theirs) in zip(optimizers, parts, strict=True):
            for master, p in zip(own, theirs, strict=True):
                master.grad, p.grad = p.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_copy_(theirs, own)
        return loss.item()

    return run


def engine_worker(case: str):
    """What `fastdit train` runs, without its data loader, EMA and logs: DeepSpeed at its defaults."""
    shape, size, _ = CASES[case]
    train = TrainConfig(
        batch_size=size, lr=LR, weight_decay=WEIGHT_DECAY, beta2=0.999, clip=0.0, schedule="constant", warmup_steps=0
    )
    world = engine.start("cpu")
    config = engine.settle(Config(model=comparable(*shape), train=train), world.device)
    model = engine.initialize(fastdit_model(EagerDiT(config.model)), config, world)

    def run(step: int) -> float:
        loss = velocity_loss(model, *batch(step, size))
        model.backward(loss)
        model.step()
        return loss.item()

    return run


def work(provider: str, case: str, threads: int) -> None:
    """Answer each line of stdin, a step's number, with its loss, seconds and CPU seconds; at the end with the peak memory in MB."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is none of the parent's
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    make = {"eager": eager_worker, "eager tuned": eager_worker, "plain": plain_worker, "engine": engine_worker}[provider]
    run = make(case)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = run(int(line))
        print(loss, time.perf_counter() - wall, time.process_time() - cpu, file=answers, flush=True)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024, file=answers, flush=True)


class Worker:
    def __init__(self, provider: str, case: str, threads: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        if provider != "eager":
            environment["GLIBC_TUNABLES"] = ALLOCATOR
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        command = [sys.executable, "-W", "ignore", __file__, "--worker", provider, case, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def turn(self, first: int) -> tuple[float, float]:
        """The loss of the last of TURN steps from `first` on, and the mean seconds of a step."""
        steps = [self.step(first + i) for i in range(TURN)]
        return steps[-1][0], sum(seconds for _, seconds, _ in steps) / TURN

    def step(self, number: int) -> tuple[float, float, float]:
        """(loss, seconds, CPU seconds of all threads)."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return tuple(map(float, self.answer().split()))

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"a worker died:\n{self.log.read().decode()[-2000:]}")
        return line

    def stop(self) -> float:
        """Peak memory in MB."""
        self.process.stdin.close()
        peak = float(self.answer())
        self.process.wait()
        return peak


def gemm_rate(shape: tuple[int, int, int], calls: int = 20) -> float:
    """FLOP/s of `a @ b` in bf16."""
    M, K, N = shape
    a, b = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(K, N, dtype=torch.bfloat16)
    a @ b
    start = time.perf_counter()
    for _ in range(calls):
        a @ b
    return 2 * M * K * N * calls / (time.perf_counter() - start)


def measure(case: str, rounds: int, threads: int) -> list[dict]:
    (width, depth, _, hidden, class_width), size, shape = CASES[case]
    workers = {p: Worker(p, case, threads) for p in PROVIDERS}
    losses = {p: worker.turn(0)[0] for p, worker in workers.items()}  # warm-up
    # the same function on the same data: what bf16 may change in the mean of 32,768 squared errors after two steps
    if max(losses.values()) - min(losses.values()) > 2**-8 * max(losses.values()):
        sys.exit(f"the losses of step 2 differ by more than 2^-8, one rounding of bf16: {losses}")
    times: dict[str, list[float]] = {p: [] for p in PROVIDERS}
    rates = []
    with telemetry.progress_bar(rounds, description=case) as bar:
        for i in range(rounds):
            rates.append(gemm_rate(shape))
            for provider in PROVIDERS[:: -1 if i % 2 else 1]:
                times[provider].append(workers[provider].turn(TURN * (1 + i))[1])
            bar.update()
    work_of_batch = size * flops(width, depth, hidden, class_width=class_width)
    rows = []
    for provider in PROVIDERS:
        seconds = times[provider]
        ratios = [e / s for e, s in zip(times["eager"], seconds, strict=True)]
        shares = [work_of_batch / rate / s for rate, s in zip(rates, seconds, strict=True)]
        rows.append({
            "case": case, "provider": provider, "batch": size, "rounds": rounds,
            "images_per_s": f"{size / statistics.median(seconds):.2f}", "lowest": f"{size / max(seconds):.2f}",
            "highest": f"{size / min(seconds):.2f}", "speedup": f"{statistics.median(ratios):.3f}",
            "share_of_bound": f"{statistics.median(shares):.3f}", "gflop_per_image": f"{work_of_batch / size / 1e9:.2f}",
            "gemm_gflops": f"{statistics.median(rates) / 1e9:.0f}", "loss_step_2": f"{losses[provider]:.5f}",
            "peak_mb": f"{workers[provider].stop():.0f}",
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.csv"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(*options.worker, options.threads)
    torch.set_num_threads(options.threads)
    record.write(options.out, [row for case in options.cases for row in measure(case, options.rounds, options.threads)])


if __name__ == "__main__":
    main()
