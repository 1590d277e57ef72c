"""`fastdit sample`: what is drawn, by one rank or several, and the files it is written to."""

import argparse
import os
import secrets
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit import distributed, files
from fastdit.config import InputError, SampleConfig
from fastdit.device import DTYPES, choose_device, device_name, native_bf16
from fastdit.distributed import World
from fastdit.files import check_writable
from fastdit.progress import progress_bar
from fastdit.sampling.class_names import parse_classes
from fastdit.sampling.npz import Parts
from fastdit.sampling.pictures import grid, save_animation, save_picture
from fastdit.sampling.sampler import BATCH, Sampler, to_images
from fastdit.sampling.solvers import SOLVERS

SHOWN = 10  # images a class in the grid, at most
FEW_CLASSES = 100  # up to here, all classes are drawn where none is named
FRAME_COLUMNS = 4


@dataclass
class Request:
    """What the user asked for; the flags of the command line by the same names tell more."""

    checkpoint: Path
    params: Path | None = None
    weights: str = "ema"
    device: str = "auto"
    dtype: str = "auto"
    classes: str | None = None
    per_class: int = 1
    seed: int = 0
    seed_per_sample: bool = False
    at_once: int = BATCH
    out: Path | None = None
    folder: Path | None = None
    gif: Path | None = None
    gif_of: str | None = None
    gif_fps: float = 10
    npz: Path | None = None
    latents: Path | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError."""
        if not any((self.out, self.folder, self.gif, self.npz, self.latents)):
            self.out = Path("samples.png")
        for flag, value in (("per-class", self.per_class), ("at-once", self.at_once)):
            if value < 1:
                raise InputError(f"--{flag} {value} must be at least 1")
        if not -1 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} must be at least -1 (drawn and printed) and below 2^63")
        if not 0 < self.gif_fps <= 100:
            raise InputError(f"--gif-fps {self.gif_fps} must be above 0 and at most 100")
        if self.gif and self.gif.suffix not in (".gif", ".webp"):
            raise InputError(f"--gif {self.gif} must end in .gif or .webp")
        for target in (self.out, self.gif, self.npz, self.latents):
            if target is not None:
                check_writable(target)

    def in_gif(self, n: int) -> list[int]:
        """Which of n samples the animation shows. Raises InputError."""
        if not self.gif or self.gif_of is None:
            return list(range(min(n, FRAME_COLUMNS))) if self.gif else []
        chosen = [part.strip() for part in self.gif_of.split(",")]
        wrong = next((part for part in chosen if not part.isdecimal() or int(part) >= n), None)
        if wrong is not None:
            raise InputError(f"--gif-of {wrong!r} is not one of the {n} samples: give numbers from 0 to {n - 1}, such as 0,1")
        return list(dict.fromkeys(int(part) for part in chosen))


class Clock:
    """Tells the warm start, by how much the first step (which compiles, captures and tunes) is slower than the second, from the
    rest."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.ticks = device, time.perf_counter(), []

    def tick(self) -> None:
        """After each step."""
        if len(self.ticks) < 2:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.ticks.append(time.perf_counter())

    def report(self, images: int) -> str:
        seconds = time.perf_counter() - self.start
        if len(self.ticks) < 2:
            return f"{images} images in {seconds:.1f} s"
        warm = max(0.0, self.ticks[0] - self.start - (self.ticks[1] - self.ticks[0]))
        return f"{images} images in {seconds:.1f} s: warm start {warm:.1f} s, then {images / (seconds - warm):.3g} images/s"


class Drawing:
    """One call of the command: samples 0 .. n−1 in batches, batch k on rank k modulo the ranks."""

    def __init__(self, sampler: Sampler, request: Request, world: World) -> None:
        """Raises InputError before anything is written."""
        self.sampler, self.request, self.world = sampler, request, world
        self.config: SampleConfig = sampler.settings(**request.settings)
        default = "all" if sampler.null <= FEW_CLASSES else "-1"
        self.classes = parse_classes(request.classes or default, sampler.null, sampler.names, request.seed)
        self.labels = [c for c in self.classes for _ in range(request.per_class)]
        self.in_gif = request.in_gif(len(self.labels))
        self.parts = Parts(request.npz, len(self.labels), request.at_once) if request.npz else None
        self.pixels = bool(request.out or request.folder or request.npz)  # of final latents
        # what is written at the end, by batch or by sample
        self.latents: dict[int, Tensor] = {}
        self.images: dict[int, np.ndarray] = {}
        self.frames: dict[int, list[Tensor]] = {i: [] for i in self.in_gif}

    def begin(self) -> None:
        """Load the codec if it is going to be needed and make the folders. Raises InputError."""
        request, sampler = self.request, self.sampler
        if self.pixels or request.gif:
            _ = sampler.codec
        if self.world.rank > 0:
            return
        if request.folder:
            try:
                request.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--folder {request.folder} cannot be made: {error.strerror}: choose another place") from error
        if self.parts:
            settings = {key: getattr(request, key) for key in ("weights", "seed", "seed_per_sample", "at_once", "per_class")}
            settings |= {"checkpoint": str(request.checkpoint.resolve()), "step": sampler.step, "dtype": sampler.dtype}
            self.parts.begin({**settings, "classes": self.classes, **vars(self.config)})

    def describe(self) -> str:
        sampler, config, names = self.sampler, self.config, self.sampler.names
        named = [f"{c} ({names[c].split(', ')[0]})" if names and c < len(names) else str(c) for c in self.classes[:SHOWN]]
        shift = f", time shift {config.time_shift:g}" if config.time_shift != 1 else ""
        interval = (config.guidance_low, config.guidance_high)
        within = f" for t in {list(interval)}" if interval != (0, 1) else ""
        seed = f"seed {self.request.seed}{' per sample' * self.request.seed_per_sample}"
        return (
            f"classes: {', '.join(named)}{', …' * (len(self.classes) > SHOWN)}\n"
            f"{seed}; {config.solver}, {config.steps} steps{shift}, guidance {config.guidance:g} (papers' scale "
            f"{1 + config.guidance:g}){within}; {sampler.dtype} on {device_name(sampler.device)}"
        )

    def draw(self) -> str:
        """Compute this rank's batches, and write what is a file of one batch or image; the speed in words."""
        request, at_once, n = self.request, self.request.at_once, len(self.labels)
        resumes = self.parts and not (request.out or request.folder or request.gif or request.latents)
        skip = lambda k: k % self.world.size != self.world.rank or bool(resumes and self.parts.has(k))
        mine = [k for k in range(-(-n // at_once)) if not skip(k)]
        clock = Clock(self.sampler.device)

        def watch(k: int, i: int, x: Tensor) -> None:
            for sample in self.in_gif:
                if sample // at_once == k:
                    self.frames[sample].append(x[sample % at_once].cpu())
            if i:
                bar.update()
            if i == self.config.steps or (i and self.config.solver != "dopri5"):  # which comes with all steps at once
                clock.tick()

        samples = self.sampler.latents(
            self.config, self.labels, request.seed, request.seed_per_sample, at_once=at_once, skip=skip, watch=watch
        )
        total = len(mine) * self.config.steps
        with progress_bar(total, description=f"{n} images", disable=self.world.rank > 0) as bar:
            for k, x in samples:
                self._keep(k, x)
        return clock.report(sum(min(at_once, n - k * at_once) for k in mine))

    def _keep(self, k: int, x: Tensor) -> None:
        """Batch k's final latents."""
        request, first = self.request, k * self.request.at_once
        if request.latents:
            self.latents[k] = x.cpu()
        if not self.pixels:
            return
        images = to_images(self.sampler.codec, x)
        if self.parts:
            self.parts.write(k, images)
        for i, image in enumerate(images, first):
            if request.folder:
                save_picture(grid(image[None], 1, gap=0), request.folder / f"{i:06d}_class_{self.labels[i]}.png")
            if request.out and i % request.per_class < SHOWN:
                self.images[i] = image

    def write(self) -> None:
        """Gather what the ranks kept and write the files that hold all of it; all ranks must call it."""
        request = self.request
        for kept in (self.latents, self.images, self.frames):
            _gather(kept, self.world)
        if self.world.rank > 0:
            return
        if request.out:
            images = np.stack([image for _, image in sorted(self.images.items())])
            save_picture(grid(images, min(request.per_class, SHOWN)), request.out)
        if request.latents:
            whole = torch.cat([x for _, x in sorted(self.latents.items())])
            with files.replacing(request.latents) as temporary, temporary.open("wb") as file:
                np.savez(file, latents=whole.numpy())
        if self.parts:
            self.parts.join(np.array(self.labels))
        if request.gif:
            steps = [torch.stack(step).to(self.sampler.device) for step in zip(*(self.frames[i] for i in self.in_gif), strict=True)]
            with progress_bar(len(steps), description="animation", unit="frame") as bar:
                frames = []
                for step in steps:
                    frames.append(grid(to_images(self.sampler.codec, step), min(len(step), FRAME_COLUMNS)))
                    bar.update()
            save_animation(frames, request.gif, request.gif_fps)


def _gather(kept: dict, world: World) -> None:
    """Join what the ranks kept under their own keys; what is empty is another rank's."""
    if world.size > 1:
        everyone: list = [None] * world.size
        dist.all_gather_object(everyone, kept, group=world.control)
        for other in everyone:
            kept.update({key: value for key, value in other.items() if len(value)})


def sample(request: Request) -> None:
    """What `fastdit sample` does. Raises InputError for bad input, before any work."""
    start = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        world = distributed.start("cuda" if request.device == "gpu" else request.device)
    else:
        world = World(0, 1, choose_device(request.device), None)  # without importing DeepSpeed
    if request.seed == -1:
        request.seed = world.together(lambda: secrets.randbits(32), everywhere=False)
    sampler = world.together(lambda: Sampler(request.checkpoint, request.weights, world.device, request.dtype, request.params))
    drawing = world.together(lambda: Drawing(sampler, request, world))
    world.together(drawing.begin)
    if world.rank == 0:
        print(f"{drawing.describe()}, loaded in {time.perf_counter() - start:.1f} s", flush=True)
        if sampler.dtype == "bf16" and not native_bf16(world.device):
            print("warning: bf16 matmuls are emulated on this device, and far slower than --dtype fp32")
    speed = drawing.draw()
    drawing.write()
    if world.rank == 0:
        print(speed + f" on each of {world.size} ranks" * (world.size > 1))
        for name in ("out", "folder", "gif", "npz", "latents"):
            if getattr(request, name):
                print(f"{name}: {getattr(request, name)}")


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Add --weights and --dtype, which all commands that draw samples share."""
    parser.add_argument(
        "--weights", metavar="ema|raw|ema_D",
        help="Weights: the average (ema), those of the last step (raw), or a further average of train.ema_more, such as ema_0.9999 "
        "(default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES),
        help="Precision of the model; auto: that of the run if the device has fast matmuls in it, else fp32, and fp32 for the base "
        "model (default: %(default)s).",
    )  # fmt: skip


def add_sampler(parser: argparse._ActionsContainer) -> None:
    """Add an argument for each field of SampleConfig, None where it is not given."""
    add = parser.add_argument
    add("--steps", "--num_steps", type=int, metavar="N", help="Number of solver steps.")
    add(
        "--solver", "--sampler", metavar="NAME",
        help=f"Solver, one of {', '.join(SOLVERS)}. heun calls the model twice per step; dopri5 is adaptive, and --steps only "
        "counts the frames of an animation; euler_stochastic is the base model's.",
    )  # fmt: skip
    add(
        "--guidance", type=float, metavar="W",
        help="Strength w of classifier-free guidance, (1+w)·v(class) - w·v(null). The scale in papers is 1+w.",
    )  # fmt: skip
    add(
        "--guidance-low", type=float, metavar="T",
        help="Least timestep with guidance, 0 to 1 (1 is noise). Steps without guidance take half of the time.",
    )  # fmt: skip
    add("--guidance-high", type=float, metavar="T", help="Greatest timestep with guidance, 0 to 1.")
    add(
        "--time-shift", type=float, metavar="S", help="Shift t -> S·t/(1+(S-1)·t) of the timesteps: above 1, more steps near noise."
    )


def sampler_settings(arguments: argparse.Namespace) -> dict:
    """Return the values of SampleConfig's fields that a command line gives."""
    given = {f.name: getattr(arguments, f.name) for f in fields(SampleConfig)}
    return {name: value for name, value in given.items() if value is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit sample`, named as the fields of Request."""
    parser.description = (
        "Draw images from a run, an exported file or the base model's .pkl. Runs as one process or under torchrun. Where an option "
        "has two names, the second is the base command's, with the same meaning."
    )
    parser.epilog = (
        "examples:\n"
        "  fastdit sample --checkpoint runs/digits --class 3,7 --per-class 8\n"
        "  fastdit sample --checkpoint model_250000s.pkl --class otter,207 --per-class 4 --guidance 3 --out grid.png"
    )
    _add_model(parser)
    _add_samples(parser.add_argument_group("samples"))
    add_sampler(parser.add_argument_group("sampler", "Defaults: the sample settings of the run."))
    _add_files(parser.add_argument_group("files", "Default: --out samples.png."))
    parser.set_defaults(**{f.name: f.default for f in fields(Request) if f.default is not MISSING})


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint", type=Path, metavar="PATH",
        help="Folder of a run (its newest checkpoint) or of a checkpoint, exported file, or the base model's model_Ns.pkl.",
    )  # fmt: skip
    add("--params", type=Path, metavar="JSON", help="Parameters of a .pkl (default: model_params_Ns.json beside it).")
    add("--loadDir", dest="load_dir", type=Path, default=Path(), metavar="DIR", help="Base command: folder of the two files below.")
    add("--loadFile", dest="load_file", metavar="PKL", help="Base command: name of the weights in --loadDir.")
    add("--loadDefFile", dest="load_def_file", metavar="JSON", help="Base command: name of the parameters in --loadDir.")
    add_weights(parser)
    add(
        "--device", choices=("auto", "cpu", "cuda", "gpu"),
        help="Device; auto: CUDA if there is a GPU; gpu: the same as cuda (default: %(default)s).",
    )  # fmt: skip


def _add_samples(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--class", "--class_label", "--class-name", dest="classes", metavar="IDS",
        help='Classes: ids or names such as 207,360 or "golden retriever,otter", all, or -1 for a random class (default: all if '
        f"there are at most {FEW_CLASSES}, else -1).",
    )  # fmt: skip
    add("--per-class", "--batch_size", type=int, metavar="N", help="Images per class (default: %(default)s).")
    add("--seed", type=int, metavar="N", help="Seed of the noise; -1: a random one, which is printed (default: %(default)s).")
    add(
        "--seed-per-sample", action="store_true",
        help="Let an image depend only on the seed and its number, not on batch size and ranks (default: one generator draws all "
        "noise, as in the base command).",
    )  # fmt: skip
    add("--at-once", type=int, metavar="N", help="Images per batch; fewer need less memory (default: %(default)s).")


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", "--out_imgname", type=Path, metavar="PNG", help=f"Grid with one row per class, of its first {SHOWN} images.")
    add("--folder", type=Path, metavar="DIR", help="Folder for one PNG file per image.")
    add("--gif", "--out_gifname", type=Path, metavar="GIF|WEBP", help="Animation of how some samples are denoised.")
    add(
        "--gif-of", metavar="I,J",
        help=f"Numbers of the samples in the animation, counted from 0 (default: the first {FRAME_COLUMNS}).",
    )  # fmt: skip
    add("--gif-fps", "--gif_fps", type=float, metavar="N", help="Frames per second of the animation (default: %(default)g).")
    add(
        "--npz", type=Path, metavar="NPZ",
        help="Images uint8 [n,S,S,C] (arr_0) and class ids (arr_1), as ADM's evaluator reads them. The same command resumes one "
        "that was killed.",
    )  # fmt: skip
    add(
        "--latents", type=Path, metavar="NPZ",
        help="Final latents fp32 [n,C,h,w] in the model's scale. No autoencoder is needed if this is the only file.",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Draw and write what the command line asks for. Raises InputError."""
    if arguments.load_file:
        arguments.checkpoint = arguments.load_dir / arguments.load_file
        if arguments.load_def_file:
            arguments.params = arguments.load_dir / arguments.load_def_file
    if arguments.checkpoint is None:
        raise InputError("fastdit sample needs --checkpoint PATH, or the base command's --loadDir and --loadFile")
    given = {f.name: getattr(arguments, f.name) for f in fields(Request) if f.name in arguments}
    sample(Request(**given, settings=sampler_settings(arguments)))
