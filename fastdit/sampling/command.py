"""`fastdit sample`: the samples that are drawn, by one rank or several, and the files that they are written to."""

import argparse
import secrets
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit import distributed, files
from fastdit.config import InputError, SampleConfig
from fastdit.device import DTYPES, device_name, native_bf16, synchronize
from fastdit.distributed import World
from fastdit.files import check_writable
from fastdit.progress import progress_bar
from fastdit.sampling.class_names import parse_classes
from fastdit.sampling.npz import Parts
from fastdit.sampling.pictures import grid, save_animation, save_picture
from fastdit.sampling.sampler import BATCH, Sampler, gather, shares
from fastdit.sampling.solvers import SOLVERS

SHOWN = 10  # images per class in the grid, and classes named in the output, at most
FEW_CLASSES = 100  # up to here, all classes are drawn if none is named
FRAME_COLUMNS = 4  # images per row of an animation


@dataclass
class SampleRequest:
    """The options of `fastdit sample`, whose help describes them; settings: values of SampleConfig that replace the run's."""

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
        """Return the ids of the samples, of n, that the animation shows. Raises InputError."""
        if not self.gif or self.gif_of is None:
            return list(range(min(n, FRAME_COLUMNS))) if self.gif else []
        chosen = [part.strip() for part in self.gif_of.split(",")]
        wrong = next((part for part in chosen if not part.isdecimal() or int(part) >= n), None)
        if wrong is not None:
            raise InputError(f"--gif-of {wrong!r} is not one of the {n} samples: give numbers from 0 to {n - 1}, such as 0,1")
        return list(dict.fromkeys(int(part) for part in chosen))


class Clock:
    """Separates warm-up time (first step minus second: compilation, capture, tuning) from steady-state time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.ticks: list[float] = []

    def tick(self) -> None:
        """Note the end of a solver step; only the first two count."""
        if len(self.ticks) < 2:
            synchronize(self.device)
            self.ticks.append(time.perf_counter())

    def report(self, images: int) -> str:
        """Return the speed of drawing `images` images in words."""
        seconds = time.perf_counter() - self.start
        if len(self.ticks) < 2:
            return f"{images} images in {seconds:.1f} s"
        warm = max(0.0, self.ticks[0] - self.start - (self.ticks[1] - self.ticks[0]))
        return f"{images} images in {seconds:.1f} s: warm start {warm:.1f} s, then {images / (seconds - warm):.3g} images/s"


class Drawing:
    """One call of the command: samples 0 .. n−1, their batches shared by the ranks, and the files that they are written to."""

    def __init__(self, sampler: Sampler, request: SampleRequest, world: World) -> None:
        """Raises InputError before anything is written."""
        self.sampler = sampler
        self.request = request
        self.world = world
        self.settings: SampleConfig = sampler.settings(**request.settings)
        default = "all" if sampler.null <= FEW_CLASSES else "-1"
        self.classes = parse_classes(request.classes or default, sampler.null, sampler.names, request.seed)
        self.labels = [c for c in self.classes for _ in range(request.per_class)]
        self.in_gif = request.in_gif(len(self.labels))
        self.parts = Parts(request.npz, len(self.labels), request.at_once) if request.npz else None
        self.needs_images = bool(request.out or request.folder or request.npz)  # of final latents
        # Written at the end: latents by the first sample of their batch; images and the latents of an animation by sample.
        self.latents: dict[int, Tensor] = {}
        self.images: dict[int, np.ndarray] = {}
        self.frames: dict[int, list[Tensor]] = {}

    def begin(self) -> None:
        """Load the codec if it is needed and make the folders. Raises InputError."""
        request = self.request
        if self.needs_images or request.gif:
            _ = self.sampler.codec
        if self.world.rank > 0:
            return
        if request.folder:
            try:
                request.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--folder {request.folder} cannot be made: {error.strerror}: choose another folder") from error
        if self.parts:
            self.parts.begin(self._npz_settings())

    def _npz_settings(self) -> dict:
        """Return all that the bytes of the npz depend on."""
        settings = {key: getattr(self.request, key) for key in ("weights", "seed", "seed_per_sample", "at_once", "per_class")}
        settings |= {"checkpoint": str(self.request.checkpoint.resolve()), "step": self.sampler.step, "dtype": self.sampler.dtype}
        return {**settings, "classes": self.classes, **vars(self.settings)}

    def announcement(self) -> str:
        """Return what is going to be drawn in words."""
        sampler, settings, names = self.sampler, self.settings, self.sampler.names
        named = [f"{c} ({names[c].split(', ')[0]})" if names and c < len(names) else str(c) for c in self.classes[:SHOWN]]
        shift = f", time shift {settings.time_shift:g}" if settings.time_shift != 1 else ""
        interval = (settings.guidance_low, settings.guidance_high)
        within = f" for t in {list(interval)}" if interval != (0, 1) else ""
        seed = f"seed {self.request.seed}{' per sample' * self.request.seed_per_sample}"
        return (
            f"classes: {', '.join(named)}{', …' * (len(self.classes) > SHOWN)}\n"
            f"{seed}; {settings.solver}, {settings.steps} steps{shift}, guidance {settings.guidance:g} (papers' scale "
            f"{1 + settings.guidance:g}){within}; {sampler.dtype} on {device_name(sampler.device)}"
        )

    def draw(self) -> str:
        """Compute this rank's batches and write the files of one batch or one image. Returns the speed in words."""
        request, at_once, steps = self.request, self.request.at_once, self.settings.steps
        adaptive = SOLVERS[self.settings.solver].adaptive
        parts = None if request.out or request.folder or request.gif or request.latents else self.parts
        skip = lambda ids: parts is not None and parts.has(ids.start // at_once)
        mine = [ids for ids in shares(len(self.labels), self.world, at_once) if not skip(ids)]
        clock = Clock(self.sampler.device)

        def watch(ids: range, step: int, x: Tensor) -> None:
            for sample in self.in_gif:
                if sample in ids:
                    self.frames.setdefault(sample, []).append(x[sample - ids.start].cpu())
            if step:
                bar.update()
            if step == steps or (step and not adaptive):  # an adaptive solver yields all steps at its end
                clock.tick()

        batches = self.sampler.latents(
            self.labels, request.seed, self.settings, per_sample=request.seed_per_sample, at_once=at_once, world=self.world,
            skip=skip, watch=watch,
        )  # fmt: skip
        description = f"{len(self.labels)} images"
        with progress_bar(len(mine) * steps, description=description, disable=self.world.rank > 0) as bar:
            for ids, x in batches:
                self._take(ids, x)
        return clock.report(sum(map(len, mine)))

    def _take(self, ids: range, x: Tensor) -> None:
        """Write the final latents of a batch, or hold them for `write`."""
        request = self.request
        if request.latents:
            self.latents[ids.start] = x.cpu()
        if not self.needs_images:
            return
        images = self.sampler.decode(x)
        if self.parts:
            self.parts.write(ids.start // request.at_once, images)
        for i, image in zip(ids, images, strict=True):
            if request.folder:
                save_picture(grid(image[None], 1, gap=0), request.folder / f"{i:06d}_class_{self.labels[i]}.png")
            if request.out and i % request.per_class < SHOWN:
                self.images[i] = image

    def write(self) -> None:
        """Gather the results of all ranks and write the files that hold all of them. All ranks must call it."""
        request = self.request
        latents = gather(self.latents, self.world)
        images = gather(self.images, self.world)
        frames = gather(self.frames, self.world)
        if self.world.rank > 0:
            return
        if request.out:
            save_picture(grid(np.stack(list(images.values())), min(request.per_class, SHOWN)), request.out)
        if request.latents:
            with files.replacing(request.latents) as temporary, temporary.open("wb") as file:
                np.savez(file, latents=torch.cat(list(latents.values())).numpy())
        if self.parts:
            self.parts.join(np.array(self.labels))
        if request.gif:
            self._write_animation([frames[i] for i in self.in_gif], request.gif)

    def _write_animation(self, frames: list[list[Tensor]], path: Path) -> None:
        """Write the animation of some samples, each given as its latents [C,h,w] after each step."""
        steps = [torch.stack(step).to(self.sampler.device) for step in zip(*frames, strict=True)]
        with progress_bar(len(steps), description="animation", unit="frame") as bar:
            pictures = []
            for x in steps:
                pictures.append(grid(self.sampler.decode(x), min(len(x), FRAME_COLUMNS)))
                bar.update()
        save_animation(pictures, path, self.request.gif_fps)


def sample(request: SampleRequest) -> None:
    """Draw samples and write them to files, as `fastdit sample` does. Raises InputError for bad input, before any work."""
    start = time.perf_counter()
    world = distributed.world_of_this_process(request.device)
    if request.seed == -1:
        request.seed = world.together(lambda: secrets.randbits(32), everywhere=False)
    sampler = world.together(lambda: Sampler(request.checkpoint, request.weights, world.device, request.dtype, request.params))
    drawing = world.together(lambda: Drawing(sampler, request, world))
    world.together(drawing.begin)
    if world.rank == 0:
        print(f"{drawing.announcement()}, loaded in {time.perf_counter() - start:.1f} s", flush=True)
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
        help="Solver: " + "; ".join(f"{name} ({solver.help})" for name, solver in SOLVERS.items()) + ".",
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
    """Add the arguments of `fastdit sample`, named as the fields of SampleRequest."""
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
    parser.set_defaults(**{f.name: f.default for f in fields(SampleRequest) if f.default is not MISSING})


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
    given = {f.name: getattr(arguments, f.name) for f in fields(SampleRequest) if f.name in arguments}
    sample(SampleRequest(**given, settings=sampler_settings(arguments)))
