"""`fastdit sample`: the samples that are drawn, by one rank or several, and the files that they are written to."""

import argparse
import os
import secrets
import time
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit import distributed, files
from fastdit.config import InputError, SampleConfig
from fastdit.data.classes import class_table
from fastdit.device import DTYPES, device_name, native_bf16, synchronize
from fastdit.distributed import World
from fastdit.files import check_writable, path_argument
from fastdit.progress import progress_bar, say, warn
from fastdit.sampling import pictures
from fastdit.sampling.class_names import FEW_CLASSES, NUMBER, parse_classes
from fastdit.sampling.npz import Parts
from fastdit.sampling.pictures import PictureFolder, grid, save_animation, save_picture
from fastdit.sampling.sampler import BATCH, Sampler, gather, shares
from fastdit.sampling.solvers import SOLVERS

SHOWN = 10  # images per class in the grid, and classes named in the output, at most
MAX_IMAGES = 10_000_000  # of a command
FRAME_COLUMNS = 4  # images per row of an animation
SUFFIXES = {"out": pictures.PICTURES, "gif": pictures.ANIMATIONS, "npz": (".npz",), "latents": (".npz",)}  # of files by flag


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
        if not 0.01 <= self.gif_fps <= 100:
            raise InputError(f"--gif-fps {self.gif_fps} must be between 0.01 and 100")
        if self.gif_of is not None and not self.gif:
            raise InputError(f"--gif-of {self.gif_of} needs --gif FILE")
        flags: dict[str, str] = {}
        for flag, target in self.targets().items():
            if flag in SUFFIXES:
                check_writable(target)
                pictures.check_suffix(f"--{flag}", target, SUFFIXES[flag])
            if (other := flags.setdefault(os.path.realpath(target), flag)) != flag:
                raise InputError(f"--{other} and --{flag} are both {target}: give two paths")

    def targets(self) -> dict[str, Path]:
        """Return the files and the folder to write, by their flags."""
        given = {flag: getattr(self, flag) for flag in ("out", "folder", "gif", "npz", "latents")}
        return {flag: path for flag, path in given.items() if path is not None}

    def in_gif(self, n: int) -> list[int]:
        """Return the ids of the samples, of n, that the animation shows. Raises InputError."""
        if not self.gif or self.gif_of is None:
            return list(range(min(n, FRAME_COLUMNS))) if self.gif else []
        chosen = [part.strip() for part in self.gif_of.split(",")]
        wrong = next((part for part in chosen if not NUMBER.fullmatch(part[:10]) or not 0 <= int(part[:10]) < n), None)
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
        self.notes: list[str] = []
        self.classes = parse_classes(request.classes, sampler.null, sampler.names, request.seed, sampler.counts, self.notes.append)
        n = len(self.classes) * request.per_class
        if n > MAX_IMAGES:
            raise InputError(f"--per-class {request.per_class} makes {n} images: at most {MAX_IMAGES:,} are drawn by one command")
        self.labels = [c for c in self.classes for _ in range(request.per_class)]
        self.in_gif = request.in_gif(n)
        self._check_sizes()
        self.parts = Parts(request.npz, n, request.at_once) if request.npz else None
        names = [f"{i:06d}_class_{c}.png" for i, c in enumerate(self.labels)]
        self.folder = PictureFolder(request.folder, names) if request.folder else None
        self.needs_images = bool(request.out or request.folder or request.npz)  # of final latents
        # Written at the end: latents by the first sample of their batch; images and the latents of an animation by sample.
        self.latents: dict[int, Tensor] = {}
        self.images: dict[int, np.ndarray] = {}
        self.frames: dict[int, list[Tensor]] = {}

    def _check_sizes(self) -> None:
        """Raise InputError if a grid is too large for its format."""
        request, size = self.request, self.sampler.config.data.image_size
        if request.out:
            columns = min(request.per_class, SHOWN)
            pictures.check_size("--out", request.out, *pictures.grid_size(len(self.classes) * columns, size, columns))
        if request.gif:
            columns = min(len(self.in_gif), FRAME_COLUMNS)
            pictures.check_size("--gif", request.gif, *pictures.grid_size(len(self.in_gif), size, columns))

    def begin(self, stack: ExitStack) -> None:
        """Load the codec if it is needed, make the folders and lock the files until `stack` is closed. Raises InputError."""
        request = self.request
        if self.needs_images or request.gif:
            _ = self.sampler.codec
        if self.world.rank > 0:
            return
        stack.enter_context(files.outputs(path for flag, path in request.targets().items() if flag != "folder"))
        if self.folder:
            self.folder.begin()
            stack.callback(self.folder.close)
        if self.parts:
            self.parts.begin(self._npz_settings())

    def _npz_settings(self) -> dict:
        """Return all that the bytes of the npz depend on. Weights are known by what they are, not by where they lie."""
        sampler = self.sampler
        settings = {key: getattr(self.request, key) for key in ("weights", "seed", "seed_per_sample", "at_once", "per_class")}
        settings |= {"checkpoint": sampler.sha256, "autoencoder": sampler.codec.sha256(), "model": asdict(sampler.config.model)}
        settings |= {"step": sampler.step, "dtype": sampler.dtype, "image_size": sampler.config.data.image_size}
        return {**settings, "classes": self.classes, **vars(self.settings)}

    def _drawn_classes(self) -> str:
        """Return the classes in words: a table if their names or images are known."""
        sampler, ids = self.sampler, list(dict.fromkeys(self.classes))
        if not sampler.names and not sampler.counts:
            return f"classes: {', '.join(map(str, ids[:SHOWN]))}{', …' * (len(ids) > SHOWN)}"
        of = lambda values, missing: [values[c] if c < len(values) else missing for c in ids]
        counts = of(sampler.counts, 0) if sampler.counts else None
        return class_table(of(sampler.names or [], "") if sampler.names else [str(c) for c in ids], None, counts, ids, SHOWN)

    def announcement(self) -> str:
        """Return what is going to be drawn in words."""
        sampler, settings = self.sampler, self.settings
        shift = f", time shift {settings.time_shift:g}" if settings.time_shift != 1 else ""
        interval = (settings.guidance_low, settings.guidance_high)
        guidance = f"guidance {settings.guidance:g} (papers' scale {1 + settings.guidance:g})"
        guidance += f" for t in {list(interval)}" if interval != (0, 1) else ""
        guidance += ", by path drop" if settings.path_drop_guidance else ""
        if sampler.config.flow.label_dropout == 0:
            guidance = "guidance 0 (the model has no null class: it was trained with flow.label_dropout=0)"
        seed = f"seed {self.request.seed}{' per sample' * self.request.seed_per_sample}"
        sampling = f"{settings.solver}, {settings.steps} steps{shift}, {guidance}; {sampler.dtype}"
        return "\n".join([self._drawn_classes(), *self.notes, f"{seed}; {sampling} on {device_name(sampler.device)}"])

    def draw(self) -> str:
        """Compute this rank's batches and write the files of one batch or one image. Returns the speed in words.

        Raises FloatingPointError if samples are not finite, InputError if a file cannot be written or memory is short.
        """
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
            try:
                for ids, x in batches:
                    self._take(ids, x)
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise InputError(f"there is not enough memory for --at-once {at_once} images: give a smaller number") from error
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
            if self.folder:
                self.folder.write(i, image)
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
            with files.writing(request.out):
                save_picture(grid(np.stack(list(images.values())), min(request.per_class, SHOWN)), request.out)
        if request.latents:
            with files.writing(request.latents), files.replacing(request.latents) as temporary, temporary.open("wb") as file:
                np.savez(file, latents=torch.cat(list(latents.values())).numpy())
        if self.folder:
            self.folder.finish()
        if self.parts:
            self.parts.join(np.array(self.labels))
        if request.gif:
            with files.writing(request.gif):
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


def sample(request: SampleRequest) -> str:
    """Draw samples and write them to files, as `fastdit sample` does. Returns the speed and the files as text.

    Raises InputError for bad input, before any work, and if a file cannot be written; FloatingPointError if samples are not finite.
    """
    start = time.perf_counter()
    world = distributed.world_of_this_process(request.device)
    if request.seed == -1:
        request.seed = world.together(lambda: secrets.randbits(32), everywhere=False)
    sampler = world.together(lambda: Sampler(request.checkpoint, request.weights, world.device, request.dtype, request.params))
    drawing = world.together(lambda: Drawing(sampler, request, world))
    with ExitStack() as stack:
        world.together(lambda: drawing.begin(stack))
        if world.rank == 0:
            say(f"{drawing.announcement()}, loaded in {time.perf_counter() - start:.1f} s")
            if sampler.dtype == "bf16" and not native_bf16(world.device):
                warn("bf16 matmuls are emulated on this device, and far slower than --dtype fp32")
        speed = world.together(drawing.draw)
        drawing.write()
    lines = [speed + f" on each of {world.size} ranks" * (world.size > 1)]
    for flag, path in request.targets().items():
        form = f" ({pictures.FORMATS[path.suffix.lower()].about})" if flag == "out" else ""
        lines.append(f"{flag}: {path}{form}")
    return "\n".join(lines)


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
        "--path-drop-guidance", action=argparse.BooleanOptionalAction,
        help="Whether v(null) of guidance leaves out the blocks between the dense ones: about half of its cost; for models trained "
        "with model.path_drop.",
    )  # fmt: skip
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
        "--checkpoint", type=path_argument, metavar="PATH",
        help="Folder of a run (its newest checkpoint) or of a checkpoint, exported file, or the base model's model_Ns.pkl.",
    )  # fmt: skip
    add("--params", type=path_argument, metavar="JSON", help="Parameters of a .pkl (default: model_params_Ns.json beside it).")
    add(
        "--loadDir",
        dest="load_dir",
        type=path_argument,
        default=Path(),
        metavar="DIR",
        help="Base command: folder of the two files below.",
    )
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
    add(
        "--out",
        "--out_imgname",
        type=path_argument,
        metavar="PNG|JPG|WEBP",
        help=f"Grid with one row per class, of its first {SHOWN} images.",
    )
    add("--folder", type=path_argument, metavar="DIR", help="Folder for one PNG file per image.")
    add("--gif", "--out_gifname", type=path_argument, metavar="GIF|WEBP", help="Animation of how some samples are denoised.")
    add(
        "--gif-of", metavar="I,J",
        help=f"Numbers of the samples in the animation, counted from 0 (default: the first {FRAME_COLUMNS}).",
    )  # fmt: skip
    add("--gif-fps", "--gif_fps", type=float, metavar="N", help="Frames per second of the animation (default: %(default)g).")
    add(
        "--npz", type=path_argument, metavar="NPZ",
        help="Images uint8 [n,S,S,C] (arr_0) and class ids (arr_1), as ADM's evaluator reads them. The same command resumes one "
        "that was killed.",
    )  # fmt: skip
    add(
        "--latents", type=path_argument, metavar="NPZ",
        help="Final latents fp32 [n,C,h,w] in the model's scale. No autoencoder is needed if this is the only file.",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> str:
    """Draw and write what the command line asks for, and return the speed and the files as text. Raises InputError."""
    if arguments.load_file is None and arguments.load_def_file is not None:
        raise InputError(f"--loadDefFile {arguments.load_def_file} needs --loadFile")
    if arguments.load_file and arguments.checkpoint:
        raise InputError(f"--checkpoint {arguments.checkpoint} and --loadFile {arguments.load_file} are two models: give one")
    if arguments.load_file:
        arguments.checkpoint = arguments.load_dir / arguments.load_file
        if arguments.load_def_file:
            arguments.params = arguments.load_dir / arguments.load_def_file
    if arguments.checkpoint is None:
        raise InputError("fastdit sample needs --checkpoint PATH, or the base command's --loadDir and --loadFile")
    given = {f.name: getattr(arguments, f.name) for f in fields(SampleRequest) if f.name in arguments}
    return sample(SampleRequest(**given, settings=sampler_settings(arguments)))
