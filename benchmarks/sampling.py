"""Images per second of sampling on a CPU: fastdit's sampler against the eager reference's, and both end to end with SD-VAE.

    python benchmarks/sampling.py [--rounds 5] [--threads 2] [--decoded-batch 1] [--out benchmarks/results/sampling.csv]

S/2 at 256 pixels, 20 Euler steps, guidance 3, batch 4, random weights, the same on both sides. The reference samples as the base
script does, in fp32; fastdit in fp32, and in bf16 where the device computes in it. Each is a process of its own, with the allocator
settings it has in real life, and they take turns, the order reversed every other round. The bound: matmul and attention FLOPs over
the rate of `a @ b` in the same precision, measured in every round. PSNR: of images (range 2) against those of fastdit in fp32, both
decoded in fp32 by a random autoencoder of SD-VAE's size.

End to end, once: the base script decodes its whole batch by the fp32 autoencoder after every step; fastdit once, at the end.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import record
from eager_reference import EagerDiT, comparable, euler, fastdit_model
from fastdit import autoencoder, sample, telemetry
from fastdit.cli import ALLOCATOR
from fastdit.config import SampleConfig
from fastdit.model import native_bf16

WIDTH, DEPTH, HEADS, HIDDEN = 384, 12, 6, 1024
TOKENS, PATCH = 256, 16
GEMM = (2048, 384, 1536)  # the shape whose rate is the bound
SEED = 7


def flops(steps: int) -> float:
    """Of one guided image: 2·M·N·K of every matmul and 4·T²·H of attention, twice a step. The modulation, whose rows are shared, is
    not counted; the timestep's map is not either."""
    block = 2 * TOKENS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + 4 * TOKENS**2 * WIDTH
    return 2 * steps * (DEPTH * block + 4 * TOKENS * WIDTH * PATCH)


def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=0.18215, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).requires_grad_(False).eval()  # fmt: skip


def noise(batch: int) -> Tensor:
    return torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(SEED))


def classes(batch: int) -> Tensor:
    """Of different classes, so that only the null half shares its modulation."""
    return torch.arange(batch) * 37 % 1000


def base_sampler(steps: int, guidance: float) -> Callable:
    """sample(batch, decode) as the base script does it: all latents are decoded after every step, where there is a decoder."""
    model, decoder = EagerDiT(comparable(WIDTH, DEPTH, HEADS, HIDDEN, None)).eval(), vae()

    @torch.no_grad()
    def run(batch: int, decode: bool) -> Tensor:
        if not decode:
            return euler(model, noise(batch), classes(batch), steps, guidance)
        x, null = noise(batch), torch.full((batch,), 1000)
        for t in torch.linspace(1, 1 / steps, steps):
            both = model(x.repeat(2, 1, 1, 1), t.expand(2 * batch), torch.cat((classes(batch), null)))
            v, v_null = both.chunk(2)
            x = x - ((1 + guidance) * v - guidance * v_null) / steps
            image = decoder.decode(x / 0.18215).sample.clamp(-1, 1)
        return image

    return run


def fastdit_sampler(precision: str, steps: int, guidance: float) -> Callable:
    """sample(batch, decode) as `fastdit sample` does it."""
    model = fastdit_model(EagerDiT(comparable(WIDTH, DEPTH, HEADS, HIDDEN, None)))
    model = model.to(sample.DTYPES[precision]).eval().requires_grad_(False)
    config = SampleConfig(steps=steps, solver="euler", guidance=guidance)
    codec = autoencoder.KL("SD-VAE", 256, torch.device("cpu"), vae()).for_decoding(torch.float32)

    def run(batch: int, decode: bool) -> Tensor:
        draw = sample.one_generator_noise(SEED, (4, 32, 32))
        [(_, x)] = sample.latents(model, config, classes(batch), torch.arange(batch), draw, 1000)
        return codec.decode(x) if decode else x

    return run


def make(provider: str, threads: int, steps: int, guidance: float) -> None:
    """In a worker: the sampler that `call` calls."""
    global sampler
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sampler = base_sampler(steps, guidance) if provider == "eager" else fastdit_sampler(provider, steps, guidance)


def call(batch: int, decode: bool) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = sampler(batch, decode)
    return time.perf_counter() - start, out


class Worker:
    """A sampler in a process of its own."""

    def __init__(self, provider: str, threads: int, steps: int, guidance: float) -> None:
        os.environ.pop("GLIBC_TUNABLES", None)
        if provider != "eager":
            os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), make, (provider, threads, steps, guidance))

    def __call__(self, batch: int, decode: bool = False) -> tuple[float, Tensor]:
        """Seconds, and the final latents or images."""
        return self.pool.submit(call, batch, decode).result()


def gemm_rate(dtype: torch.dtype, calls: int = 20) -> float:
    """FLOP/s of `a @ b`."""
    M, K, N = GEMM
    a, b = torch.randn(M, K, dtype=dtype), torch.randn(K, N, dtype=dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(calls):
        a @ b
    return 2 * M * K * N * calls / (time.perf_counter() - start)


def psnr(images: Tensor, reference: Tensor) -> float:
    """In dB, of images in [-1,1]."""
    return 10 * torch.log10(4 / (images - reference).square().mean()).item()


def measure(options: argparse.Namespace, workers: dict[str, Worker]) -> list[dict]:
    """A row a provider, without decoding."""
    times: dict[str, list[float]] = {p: [] for p in workers}
    rates: dict[str, list[float]] = {p: [] for p in workers}
    finals = {}
    with telemetry.progress_bar((1 + options.rounds) * len(workers), description="sampling", unit="batch") as bar:
        for i in range(-1, options.rounds):  # the first warms up
            for provider in list(workers)[:: -1 if i % 2 else 1]:
                rate = gemm_rate(sample.DTYPES["bf16" if provider == "bf16" else "fp32"])
                seconds, finals[provider] = workers[provider](options.batch)
                if i >= 0:
                    times[provider].append(seconds)
                    rates[provider].append(rate)
                bar.update()
    codec = autoencoder.KL("SD-VAE", 256, torch.device("cpu"), vae()).for_decoding(torch.float32)
    images = {provider: codec.decode(x) for provider, x in finals.items()}
    rows = []
    for provider, seconds in times.items():
        shares = [options.batch * flops(options.steps) / rate / s for rate, s in zip(rates[provider], seconds, strict=True)]
        rows.append({
            "case": "S/2", "provider": provider, "precision": "bf16" if provider == "bf16" else "fp32", "batch": options.batch,
            "steps": options.steps, "threads": options.threads, "rounds": options.rounds,
            "images_per_s": f"{options.batch / statistics.median(seconds):.4f}",
            "speedup": f"{statistics.median(e / s for e, s in zip(times['eager'], seconds, strict=True)):.3f}",
            "bound_share": f"{statistics.median(shares):.3f}",
            "gemm_gflops": f"{statistics.median(rates[provider]) / 1e9:.0f}",
            "psnr_db": "" if provider == "fp32" else f"{psnr(images[provider], images['fp32']):.1f}",
        })  # fmt: skip
    return rows


def end_to_end(options: argparse.Namespace, workers: dict[str, Worker]) -> list[dict]:
    """A row a provider of one batch, decoded."""
    times, images = {}, {}
    with telemetry.progress_bar(len(workers), description="end to end", unit="batch") as bar:
        for provider, worker in workers.items():
            times[provider], images[provider] = worker(options.decoded_batch, decode=True)
            bar.update()
    return [
        {
            "case": "S/2 and SD-VAE", "provider": provider, "precision": "bf16" if provider == "bf16" else "fp32",
            "batch": options.decoded_batch, "steps": options.steps, "threads": options.threads, "rounds": 1,
            "images_per_s": f"{options.decoded_batch / seconds:.4f}", "speedup": f"{times['eager'] / seconds:.3f}",
            "bound_share": "", "gemm_gflops": "",
            "psnr_db": "" if provider == "fp32" else f"{psnr(images[provider], images['fp32']):.1f}",
        }
        for provider, seconds in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--decoded-batch", type=int, default=1, help="images end to end; 0: none")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    providers = ["eager", "fp32"] + ["bf16"] * native_bf16(torch.device("cpu"))
    workers = {p: Worker(p, options.threads, options.steps, options.guidance) for p in providers}
    rows = measure(options, workers)
    if options.decoded_batch:
        rows += end_to_end(options, workers)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""))
    record.write(options.out, rows)


if __name__ == "__main__":
    main()
