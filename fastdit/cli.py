"""The command line. Exit codes: 0; 1 for a run that diverged; 2 for bad input, after one sentence; 75 after SIGTERM, saved;
141 where the reader of stdout has gone."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from fastdit.config import InputError, SampleConfig, Stopped, parse
from fastdit.data.imagenet import COUNTS

# Huge pages, and what is freed is kept for the next step: without them a step on a CPU spends 8-12 % in page faults and TLB misses.
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"

# Read when CUDA and NCCL start: freed memory serves other shapes too; a collective that times out leaves a trace of all ranks.
CUDA_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}  # fmt: skip


def _tune_environment() -> None:
    """Set what CUDA and glibc's allocator read, unless the user did. glibc reads GLIBC_TUNABLES once, at the start: this process
    starts again with it, which takes 20 ms before anything is imported."""
    for name, value in CUDA_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _prepare(arguments: argparse.Namespace) -> None:
    from fastdit.data.prepare import describe, prepare

    path = lambda text: Path(text) if text else None
    sources = [Path(source) for source in arguments.sources]
    print(describe(prepare(sources, path(arguments.out), path(arguments.val), path(arguments.devkit), arguments.verify)))


def _encode(arguments: argparse.Namespace) -> None:
    from fastdit.data.encode import encode

    manifest = encode(
        Path(arguments.index), Path(arguments.out), arguments.autoencoder, arguments.image_size, arguments.dtype,
        arguments.batch_size, arguments.split, arguments.max_bad_files, arguments.device,
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        size = sum(file["bytes"] for file in manifest["files"].values())
        print(f"latents: {arguments.out} ({manifest['images']:,} images and their mirror images, {size / 2**30:.2f} GiB)")
        print(f"train on them with data.source={arguments.out} data.autoencoder={arguments.autoencoder} data.flip=true")


def _file_and_overrides(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    words = arguments.settings + arguments.overrides
    # `fastdit train key=value` without a file: the first positional is an override then
    return (words.pop(0) if words and "=" not in words[0] else None), words


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | section.key=value", help="a YAML file first (optional), then overrides"
    )


def _train(arguments: argparse.Namespace) -> None:
    path, words = _file_and_overrides(arguments)
    if arguments.resume is not None:
        words.append(f"train.resume={arguments.resume}")
    config = parse(path, words)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return
    from fastdit.training.loop import train

    run = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"run: {run} (curves.png, metrics.jsonl, samples/, checkpoints/)")


def _sample(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    file = arguments.checkpoint
    if arguments.load_file:  # the base command's names
        file = arguments.load_dir / arguments.load_file
        arguments.params = arguments.load_dir / arguments.load_def_file if arguments.load_def_file else arguments.params
    if file is None:
        raise InputError("fastdit sample needs --checkpoint PATH, or the base command's --loadDir and --loadFile")
    from fastdit.sampling.command import Request, run

    keys = ("steps", "solver", "guidance", "guidance_low", "guidance_high", "time_shift")
    settings = {key: given[key] for key in keys if given[key] is not None}
    named = {f.name: given[f.name] for f in dataclasses.fields(Request) if f.name not in ("checkpoint", "settings")}
    run(Request(checkpoint=file, settings=settings, **named))


def _request(arguments: argparse.Namespace):
    from fastdit.evaluation.command import Request

    keys = ("source", "features", "feature_sha256", "spatial", "reference", "split", "image_size", "samples", "labels", "seed",
            "weights", "dtype")  # fmt: skip
    given = {key: getattr(arguments, key) for key in keys if hasattr(arguments, key)}
    if given["reference"] is None:
        if given["features"] != "digits":
            raise InputError("--reference is needed: an .npz of statistics or images, a folder, an index or mnist5k")
        given["reference"] = "mnist5k"
    sampler = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(SampleConfig)}
    return Request(**given, sampler={key: value for key, value in sampler.items() if value is not None})


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastdit.evaluation.command import evaluate, table

    path = lambda text: Path(text) if text else None
    request = _request(arguments)
    if request.source is None and arguments.save_reference is None:
        raise InputError("nothing to do: give a source to evaluate, or --save-reference to keep the reference's statistics")
    result = evaluate(request, path(arguments.out), path(arguments.save_reference))
    if os.environ.get("RANK", "0") == "0":
        if "metrics" in result:
            print(table(result))
            print(f"result: {arguments.out} (every choice behind these numbers; again: {result['command']})")
        if arguments.save_reference:
            print(f"reference: {arguments.save_reference}")


def _sweep(arguments: argparse.Namespace) -> None:
    from fastdit.evaluation.sweep import parse_axes, sweep, table

    out = Path(arguments.out)
    rows = sweep(_request(arguments), parse_axes(arguments.axes), out)
    if os.environ.get("RANK", "0") == "0":
        print(table(rows))
        print(f"table: {out}; picture: {out.with_suffix('.png')} (the same seeds under each setting)")


def _export(arguments: argparse.Namespace) -> None:
    from fastdit.checkpoint import export

    out = Path(arguments.out)
    step = export(Path(arguments.checkpoint), arguments.weights, out)
    print(f"exported: {out} and {out.with_suffix('.json').name} ({arguments.weights} weights of step {step})")


def _import_base(arguments: argparse.Namespace) -> None:
    from fastdit.convert.base import import_run

    parameters = Path(arguments.params) if arguments.params else None
    print(f"checkpoint: {import_run(Path(arguments.pickle), parameters, Path(arguments.out))}")


def _info(_: argparse.Namespace) -> None:
    from fastdit.planning import doctor

    print(doctor.info())


def _plan(arguments: argparse.Namespace) -> None:
    from fastdit.planning import cards, plan

    path, words = _file_and_overrides(arguments)
    preset = arguments.preset or (None if path else "XL/2")
    named = {"model.preset": preset, "train.batch_size": arguments.batch_size, "zero.stage": arguments.stage}
    named["train.recompute"] = arguments.recompute
    config = plan.settings(path, [*words, *(f"{key}={value}" for key, value in named.items() if value is not None)])
    card = cards.find_card(arguments.gpu)
    made = plan.make(config, card, arguments.gpus, arguments.epochs, arguments.images, arguments.price_per_gpu_hour)
    print(json.dumps(made, indent=1) if arguments.json else plan.describe(made))


def _doctor(arguments: argparse.Namespace) -> None:
    config = parse(*_file_and_overrides(arguments))
    from fastdit.planning import doctor

    found = doctor.examine(config)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found, indent=1) if arguments.json else doctor.describe(found))


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict a run's FLOPs, memory, hours and cost",
        description="Predict what a run needs, from the model's shapes and a table of datasheets: nothing is measured, no GPU is "
        "needed. Without a CONFIG.yaml the model sees ImageNet's latents (4x32x32, 1000 classes).",
        epilog="example: fastdit plan --preset XL/2 --gpu h100 --gpus 8 --epochs 80 --price-per-gpu-hour 2.5",
    )
    _add_settings(plan)
    plan.add_argument("--preset", metavar="NAME", help="model.preset (default: the file's; XL/2 without one)")
    plan.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100, h100, h200, h800, b200, rtx4090, rtx5090 (default: h100)"
    )
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="in all, 8 a node (default: %(default)s)")
    plan.add_argument("--epochs", type=float, default=80, metavar="N", help="default: %(default)s")
    plan.add_argument(
        "--images", type=int, default=COUNTS["train"], metavar="N", help="images per epoch (default: ImageNet's %(default)s)"
    )
    plan.add_argument("--batch-size", type=int, metavar="N", help="train.batch_size: images a GPU and micro-step")
    plan.add_argument("--stage", type=int, choices=(1, 2, 3), help="zero.stage")
    plan.add_argument(
        "--recompute", choices=("none", "light", "full"), help="train.recompute: what the backward pass computes again"
    )
    plan.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="adds the cost, in the same currency")
    plan.add_argument("--json", action="store_true", help="all figures as JSON, in bytes, FLOPs and seconds")
    plan.set_defaults(run=_plan)


def _add_sample(commands) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw images from a checkpoint",
        description="Draw images from a run, an exported file or the base model's .pkl. Works alone and under torchrun. "
        "Where a flag has two names, the second is the base command's; its meaning is the same.",
        epilog="example: fastdit sample --checkpoint model_250000s.pkl --class otter,207 --per-class 4 --guidance 3 --out grid.png",
    )
    add = sample.add_argument
    add(
        "--checkpoint", type=Path, metavar="PATH",
        help="a run's folder (its newest checkpoint), a checkpoint's, an exported file, or the base model's model_Ns.pkl",
    )  # fmt: skip
    add("--loadDir", dest="load_dir", type=Path, default=Path(), metavar="DIR", help="the base command's way to name it: a folder")
    add("--loadFile", dest="load_file", metavar="PKL", help="and a file in it")
    add("--params", type=Path, metavar="JSON", help="of a .pkl (default: model_params_Ns.json beside it)")
    add("--loadDefFile", dest="load_def_file", metavar="JSON", help="the same, a file in --loadDir")
    add(
        "--weights", default="ema", metavar="ema|raw|ema_D",
        help="averaged, of the last step, or a decay of train.ema_more (default: ema)",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda", "gpu"), default="auto", help="gpu: cuda (default: CUDA when there is one)")
    add(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the model (default: the run's precision where the device computes in it; fp32 for the base model)",
    )  # fmt: skip

    what = sample.add_argument_group("what is drawn")
    add = what.add_argument
    add(
        "--class", "--class_label", "--class-name", dest="classes", metavar="IDS",
        help='ids or names such as 207,360 or "golden retriever,otter", all, or -1 for a random class (default: all of up to 100 '
        "classes, else -1)",
    )  # fmt: skip
    add("--per-class", "--batch_size", type=int, default=1, metavar="N", help="images a class (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise; -1: drawn and printed (default: %(default)s)")
    add(
        "--seed-per-sample", action="store_true",
        help="an image depends on the seed and its number alone, not on batch or ranks (default: one generator draws all noise, "
        "as the base command)",
    )  # fmt: skip
    add("--at-once", type=int, default=100, metavar="N", help="images a batch: less needs less memory (default: %(default)s)")

    how = sample.add_argument_group("how (defaults: the run's sample settings)")
    add = how.add_argument
    add("--steps", "--num_steps", type=int, metavar="N", help="solver steps")
    add(
        "--solver", "--sampler", metavar="NAME",
        help="euler, heun (calls the model twice a step), dpm++ (DPM-Solver++ 2M), dopri5 "
        "(adaptive: --steps only count the frames), euler_stochastic (the base model's), sde (Euler-Maruyama)",
    )  # fmt: skip
    add("--guidance", type=float, metavar="W", help="v = (1+W)·v(class) - W·v(null); papers' scale is 1+W")
    add("--guidance-low", type=float, metavar="T", help="guidance only where t >= T (t = 1 is noise); with high, saves time")
    add("--guidance-high", type=float, metavar="T", help="and only where t <= T")
    add("--time-shift", type=float, metavar="S", help="t -> S·t/(1+(S-1)·t): above 1, more of the steps near noise")

    files = sample.add_argument_group("files (default: --out samples.png)")
    add = files.add_argument
    add("--out", "--out_imgname", type=Path, metavar="PNG", help="a grid: a row a class, its first 10 images")
    add("--folder", type=Path, metavar="DIR", help="a PNG file an image")
    add("--gif", "--out_gifname", type=Path, metavar="GIF|WEBP", help="the denoising of some samples, animated")
    add("--gif-of", metavar="I,J", help="which samples, counted from 0 (default: the first 4)")
    add("--gif-fps", "--gif_fps", type=float, default=10, metavar="N", help="frames a second (default: %(default)s)")
    add(
        "--npz", type=Path, metavar="NPZ",
        help="arr_0 (images uint8 [n,S,S,C]) and arr_1 (class ids), as ADM's evaluator reads them; a killed command goes on",
    )  # fmt: skip
    add(
        "--latents", type=Path, metavar="NPZ", help="final latents fp32 [n,C,h,w] in the model's scale; alone, needs no autoencoder"
    )
    sample.set_defaults(run=_sample)


def _add_metrics_options(parser: argparse.ArgumentParser) -> None:
    """What evaluate and sweep share: the feature network, the reference, the samples."""
    parser.add_argument(
        "--features", required=True, metavar="digits|FILE",
        help="the built-in digits' classifier, or a TorchScript file such as inception-2015-12-05.pt (nothing is downloaded)",
    )  # fmt: skip
    parser.add_argument("--feature-sha256", metavar="HASH", help="that the file must have")
    parser.add_argument(
        "--spatial", metavar="MODULE", help="also sFID, on this submodule's first 7 channels (layers.mixed_6.conv); unverified"
    )
    parser.add_argument(
        "--reference", metavar="PATH",
        help="an .npz of statistics (ADM's: mu, sigma, mu_s, sigma_s) or of images, a folder, an index or mnist5k (default with "
        "digits: mnist5k)",
    )  # fmt: skip
    parser.add_argument("--split", choices=("train", "val"), default="train", help="of an index or mnist5k (default: %(default)s)")
    parser.add_argument("--image-size", type=int, metavar="N", help="that an index' images are cut to")
    parser.add_argument("--samples", type=int, metavar="N", help="to draw from a checkpoint (default: 50,000; with digits 500)")
    parser.add_argument(
        "--labels", choices=("balanced", "random"), default="balanced",
        help="each class equally often, or drawn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of noise and random labels (default: %(default)s)")
    parser.add_argument("--weights", default="ema", metavar="ema|raw|ema_D", help="as of `fastdit sample` (default: ema)")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the model, as of `fastdit sample` (default: auto)"
    )
    sampler = parser.add_argument_group("sampler", "as of `fastdit sample`; defaults: the run's")
    for f in dataclasses.fields(SampleConfig):
        sampler.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), metavar="X")


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="FID, KID, Inception score, precision and recall",
        description="Evaluate a checkpoint's samples, drawn straight into the metrics, or images that are there. Works alone and "
        "under torchrun. What the numbers depend on is written beside them.",
        epilog="examples: fastdit evaluate runs/digits --features digits; fastdit evaluate runs/xl --features "
        "inception-2015-12-05.pt --reference VIRTUAL_imagenet256_labeled.npz; fastdit evaluate --features inception-2015-12-05.pt "
        "--reference imagenet.index --image-size 256 --save-reference imagenet256.npz",
    )
    evaluate.add_argument(
        "source", nargs="?", metavar="SOURCE",
        help="a run's folder (its newest checkpoint), a checkpoint's or an exported file; or images: an .npz (arr_0, arr_1), a "
        "folder, an index, mnist5k",
    )  # fmt: skip
    _add_metrics_options(evaluate)
    evaluate.add_argument(
        "--out", default="evaluation.json", metavar="JSON", help="metrics and every choice behind them (default: %(default)s)"
    )
    evaluate.add_argument("--save-reference", metavar="NPZ", help="write the reference's statistics, to be read by --reference")
    evaluate.set_defaults(run=_evaluate)


def _add_sweep(commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="FID over guidance, steps, EMA decays, …",
        description="Evaluate a checkpoint under every combination of sampler settings and weights: a table with the best row "
        "marked, a CSV, and a picture of the same seeds under each setting.",
        epilog="example: fastdit sweep runs/digits guidance=0,1,2 steps=8,15 weights=ema,raw --features digits --samples 500",
    )
    sweep.add_argument("source", metavar="CHECKPOINT", help="a run's folder, a checkpoint's or an exported file")
    sweep.add_argument(
        "axes", nargs="+", metavar="KEY=VALUE,VALUE",
        help=f"KEY: weights, {', '.join(f.name for f in dataclasses.fields(SampleConfig))}",
    )  # fmt: skip
    _add_metrics_options(sweep)
    sweep.add_argument(
        "--out", default="sweep.csv", metavar="CSV", help="the table; the picture lies beside it (default: %(default)s)"
    )
    sweep.set_defaults(run=_sweep)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdit", description="Train and sample flow-matching diffusion transformers.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train, or continue, a run",
        description="Train a run, or continue it where it stopped. Works alone, under `deepspeed --module` and under torchrun.",
        epilog="example: fastdit train launch/configs/quickstart.yaml train.total_steps=1000 model.depth=8",
    )
    _add_settings(train)
    train.add_argument(
        "--resume", metavar="auto|never|DIR", help="the same as train.resume=…; default auto: continue if there is a checkpoint"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved config as YAML and stop")
    train.set_defaults(run=_train)

    prepare = commands.add_parser(
        "prepare",
        help="index archives or folders of images where they lie",
        description="Make the index of a data set, in place: nothing is unpacked or copied. A run that was killed goes on where it "
        "stopped. Images that cannot be decoded are left out and listed in bad_files.csv.",
        epilog="example: fastdit prepare ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar "
        "--devkit ILSVRC2012_devkit_t12.tar.gz",
    )
    prepare.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="ImageNet's train archive, a folder of class folders, or tars of images (class: the folder in the path, or a .cls or "
        ".json file beside the image); of a folder of tars, all",
    )  # fmt: skip
    prepare.add_argument("--out", metavar="INDEX", help="the index' folder (default: SOURCE.index, beside the source)")
    prepare.add_argument("--val", metavar="SOURCE", help="validation images: ImageNet's archive (with --devkit), or as SOURCE")
    prepare.add_argument(
        "--devkit", metavar="TAR.GZ", help="ILSVRC2012_devkit_t12.tar.gz: classes of the validation archive, class names"
    )
    prepare.add_argument("--verify", action="store_true", help="first compare the archives with ImageNet's published MD5 sums")
    prepare.set_defaults(run=_prepare)

    encode = commands.add_parser(
        "encode",
        help="encode an index' images to latents",
        description="Encode every image of an index, as it is and mirrored, to the mean and log-variance of an autoencoder's "
        "latents. Works alone and under torchrun; a run that was killed goes on where it stopped.",
        epilog="example: torchrun --nproc_per_node 8 -m fastdit.cli encode imagenet.index --autoencoder stabilityai/sd-vae-ft-ema "
        "--out latents256",
    )
    encode.add_argument("index", metavar="INDEX", help="what `fastdit prepare` made")
    encode.add_argument("--out", required=True, metavar="DIR", help="the folder of the latents")
    encode.add_argument("--autoencoder", required=True, metavar="ID", help="folder or hub id of a diffusers AutoencoderKL")
    encode.add_argument("--image-size", type=int, default=256, metavar="N", help="pixels, square (default: %(default)s)")
    encode.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="of the autoencoder (default: bf16 where fast)"
    )
    encode.add_argument("--batch-size", type=int, default=32, metavar="N", help="images a rank (default: %(default)s)")
    encode.add_argument("--split", choices=("train", "val"), default="train", help="default: %(default)s")
    encode.add_argument("--max-bad-files", type=int, default=10, metavar="N", help="one more ends the run (default: %(default)s)")
    encode.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA when there is one")
    encode.set_defaults(run=_encode)

    _add_sample(commands)

    _add_evaluate(commands)
    _add_sweep(commands)

    export = commands.add_parser(
        "export",
        help="write a model's weights to one safetensors file",
        description="Write a checkpoint's weights, of any ZeRO stage and number of ranks, to one safetensors file, with its config "
        "as JSON beside it. `fastdit sample --checkpoint FILE` reads it.",
    )
    export.add_argument("checkpoint", metavar="DIR", help="a run's folder (its newest checkpoint) or a checkpoint's")
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--weights", default="ema", metavar="ema|raw|ema_D", help="as of `fastdit sample` (default: ema)")
    export.set_defaults(run=_export)

    base = commands.add_parser("import-base", help="convert a checkpoint of the published base model")
    base.add_argument("pickle", metavar="model_Ns.pkl", help="the base model's weights; code in it is refused, never run")
    base.add_argument("--params", metavar="JSON", help="its parameters (default: model_params_Ns.json beside it)")
    base.add_argument(
        "--out", required=True, metavar="DIR", help="the run's folder to make; `fastdit sample --checkpoint DIR` draws from it"
    )
    base.set_defaults(run=_import_base)

    _add_plan(commands)

    doctor = commands.add_parser(
        "doctor",
        help="measure this machine, and what keeps a run from its speed",
        description="Measure the rates of matmuls, attention, memory, links and data, the step that they allow, and a few real "
        "training steps; name the largest gap. Works alone and under torchrun; keeps no files.",
        epilog="example: fastdit doctor launch/configs/quickstart.yaml train.batch_size=128",
    )
    _add_settings(doctor)
    doctor.add_argument("--json", action="store_true", help="all figures as JSON, in seconds, bytes/s, FLOP/s and images/s")
    doctor.set_defaults(run=_doctor)

    info = commands.add_parser("info", help="versions, device, and which backend each op uses")
    info.set_defaults(run=_info)
    return parser


def _reader_gone() -> int:
    """After a BrokenPipeError: the exit code of a program that SIGPIPE ends, if it was stdout's; else the error again."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        return 141
    raise


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    # argparse takes no positional after an option behind a `nargs="*"`: overrides may come there all the same
    arguments, rest = parser.parse_known_args(words)
    arguments.overrides = rest
    if words is None and arguments.command in ("train", "sample", "encode", "evaluate", "sweep", "doctor"):
        _tune_environment()
    if rest and ("settings" not in arguments or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    except (InputError, Stopped) as error:
        if os.environ.get("RANK", "0") == "0":  # one sentence, not one a rank
            print(f"fastdit: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 75  # EX_TEMPFAIL: try again
    except FloatingPointError as error:
        print(f"fastdit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastdit: interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
