"""Images per second of guided sampling at S/2, 256 pixels: the base script's sampler and `fastdit sample`'s, with and without VAE.

20 Euler steps, guidance w = 3, the same random weights, noise and classes. The reference samples in fp32, as the base script does;
fastdit in fp32 and, if the device computes in it, in bf16. Case "S/2": only latents. Case "S/2 and SD-VAE": the base script decodes
its batch by the fp32 autoencoder after every step, fastdit once at the end. `cold_s`: seconds of the first batch of a process,
compilation and capture included. `bound_share`: share of the time that the FLOPs of matmuls and attention take at the rate of one
large matmul in the same precision. `parity`: the largest difference from the reference's latents, relative to their largest value;
`psnr_db`: PSNR of decoded images (range 2) against the reference's latents decoded by the same fp32 autoencoder. Without diffusers,
bf16 latents are judged by the root mean square of their difference (`latents_rms`).
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_train_step import CASES, matmul_of
from benchmarks.eager_reference import EagerDiT, comparable, euler, fastdit_model
from benchmarks.harness import DEVICE, PRECISION, Group, Result, Worker, quantiles, speedup, start, take_turns, timed
from benchmarks.roofline import velocity_flops
from fastdit import autoencoder
from fastdit.config import SampleConfig
from fastdit.device import DTYPES
from fastdit.planning.machine_rates import matmul_rate
from fastdit.sampling import sampler
from fastdit.sampling.fast import fast_velocity

SUITE = "sampling"
SHAPE = CASES["S/2"][0]
STEPS, GUIDANCE, SEED, NULL = 20, 3.0, 7, 1000
PARITY = 1e-3  # limit on fp32 latents: rounding over 20 steps; bf16 latents are limited by the PSNR
PSNR = 35  # dB, lower limit: bf16 against fp32
RMS = 2**-5  # limit on bf16 latents: a velocity's rounding of 2^-8, which guidance w = 3 multiplies by 1 + 2w


def noise(batch: int) -> Tensor:
    return torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)


def classes(batch: int) -> Tensor:
    """Return classes that all differ, so that only the null half shares its modulation."""
    return (torch.arange(batch) * 37 % NULL).to(DEVICE)


def sample_flops() -> int:
    """Return the FLOPs of one sample: two velocities per step."""
    return 2 * STEPS * velocity_flops(comparable(*SHAPE))


def eager_sampler(decoded: bool) -> Callable[[int], Tensor]:
    """Return the base script's sampler as a function of the batch size to latents, or to images if `decoded`: the script decodes
    after every step."""
    model = EagerDiT(comparable(*SHAPE)).eval().to(DEVICE)
    vae = vae_of_size().to(DEVICE) if decoded else None

    @torch.no_grad()
    def run(batch: int) -> Tensor:
        if not decoded:
            return euler(model, noise(batch), classes(batch), STEPS, GUIDANCE)
        watch = lambda x: vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
        return euler(model, noise(batch), classes(batch), STEPS, GUIDANCE, watch)

    return run


def fastdit_sampler(precision: str, decoded: bool) -> Callable[[int], Tensor]:
    """Return `fastdit sample`'s sampler as a function of the batch size to latents, or to images if `decoded`."""
    model = fastdit_model(EagerDiT(comparable(*SHAPE))).to(DEVICE, DTYPES[precision]).eval().requires_grad_(False)
    config = SampleConfig(steps=STEPS, solver="euler", guidance=GUIDANCE)
    codec = autoencoder.KL("SD-VAE", 256, DEVICE, vae_of_size()) if decoded else None
    if codec:  # as sample.Sampler does
        codec.for_decoding(DTYPES[precision if DEVICE.type == "cuda" else "fp32"])
    run_velocity = fast_velocity(model, DEVICE)

    def run(batch: int) -> Tensor:
        ids, draw = torch.arange(batch, device=DEVICE), lambda ids, steps: noise(batch)[None]
        [(_, x)] = sampler.latents(model, config, classes(batch), ids, draw, NULL, run=run_velocity)
        return codec.decode(x) if decoded else x

    return run


def provider(name: str, decoded: bool) -> Callable[[int], tuple]:
    """In a worker: return a function of the batch size to seconds, and the latents or images on the CPU."""
    sampler = eager_sampler(decoded) if name == "eager" else fastdit_sampler(name.removeprefix("fastdit "), decoded)

    def run(batch: int) -> tuple[float, Tensor]:
        out, wall, _ = timed(lambda: sampler(batch))
        return wall, out.float().cpu()

    return run


def vae_of_size():
    """Return fixtures.autoencoder()."""
    from benchmarks import fixtures  # here: latents need neither diffusers nor the packages that photographs come from

    return fixtures.autoencoder()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Return the PSNR in dB of images in [-1,1]."""
    return 10 * torch.log10(4 / (images - reference).square().mean()).item()


def decode(latents: Tensor) -> Tensor:
    return autoencoder.KL("SD-VAE", 256, torch.device("cpu"), vae_of_size()).decode(latents)


def check(finals: dict[str, Tensor], decoded: bool) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the columns that say how far each provider's latents or images are from eager's, and the reasons of those too far."""
    values, errors, eager = {}, {}, finals.get("eager")
    for name, x in finals.items():
        if eager is None:
            errors[name] = "parity: there is no eager reference to compare with"
            continue
        away = ((x - eager).abs().max() / eager.abs().max()).item()
        values[name] = {"parity": f"{away:.1e}"}
        if name.endswith("bf16"):
            if not (decoded or importlib.util.find_spec("diffusers")):
                rms = ((x - eager).square().mean() / eager.square().mean()).sqrt().item()
                values[name]["latents_rms"] = f"{rms:.1e}"
                if not rms <= RMS:
                    errors[name] = f"parity: latents differ by a root mean square of {rms:.1e}, more than {RMS}"
                continue
            db = psnr(x, eager) if decoded else psnr(decode(x[:1]), decode(eager[:1]))
            values[name]["psnr_db"] = f"{db:.1f}"
            if not db >= PSNR:  # or not a number
                errors[name] = f"parity: the images' PSNR is {db:.1f} dB, less than {PSNR}"
        elif not away <= PARITY:
            errors[name] = f"parity: {'images' if decoded else 'latents'} differ by {away:.1e}, more than {PARITY}"
    return values, errors


def measure(batch: int, decoded: bool, names: tuple[str, ...], turns: int, say: Callable) -> dict[str, Result]:
    make = functools.partial(Worker, "benchmarks.bench_sampling:provider")
    workers, errors = start({name: functools.partial(make, name, decoded, allocator=name != "eager") for name in names}, say)
    calls = {name: lambda _, w=w: w(batch) for name, w in workers.items()}
    shape = matmul_of("S/2")
    rates = {f"limits {p}": lambda _, p=p: matmul_rate(shape, DTYPES[p], DEVICE) for p in {"fp32", PRECISION}}
    taken, failed = take_turns(rates | calls, turns + 1, say)  # the first is cold
    errors |= failed
    peaks = {name: w.peak_memory() for name, w in workers.items() if name not in errors}
    for worker in workers.values():
        worker.stop()
    values, failed = check({name: taken[name][-1][1] for name in peaks}, decoded)
    errors |= failed
    samples = {name: [] if name in errors else [turn[0] for turn in taken[name][1:]] for name in names}
    results = {}
    for name in names:
        key = {"case": "S/2 and SD-VAE" if decoded else "S/2", "provider": name, "size": f"batch {batch}"}
        values_of_row = {}
        if samples[name]:
            precision = name.removeprefix("fastdit ") if name != "eager" else "fp32"
            median, rate = quantiles(samples[name])[0], statistics.median(taken[f"limits {precision}"])
            values_of_row = {
                "precision": precision,
                "images_per_s": f"{batch / median:.4g}", **speedup(samples["eager"], samples[name]),
                "bound_share": "" if decoded else f"{batch * sample_flops() / rate / median:.3f}", **values[name],
                "cold_s": f"{taken[name][0][0]:.3g}", "peak_mb": f"{peaks[name] / 1e6:.0f}", "gemm_gflops": f"{rate / 1e9:.1f}",
            }  # fmt: skip
        results[name] = Result(key, samples[name], values_of_row, errors.get(name, ""))
    return results


def groups(full: bool) -> dict[str, Group]:
    names = tuple(dict.fromkeys(("eager", "fastdit fp32", f"fastdit {PRECISION}")))
    cuda = DEVICE.type == "cuda"
    batch, turns = (64, 5) if cuda else (4, 5) if full else (2, 2)
    made = {"S/2": Group(names, functools.partial(measure, batch, False, names, turns))}
    if full or cuda:
        made["S/2 and SD-VAE"] = Group(names, functools.partial(measure, 16 if cuda else 1, True, names, 1))
    return made


def test_sampling(replay, group, member) -> None:
    replay(group, member)
