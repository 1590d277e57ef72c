"""The command line. Exit codes: 0; 1 for a run that diverged; 2 for bad input, after one sentence; 75 after SIGTERM, saved."""

import argparse
import os
import sys
from pathlib import Path

from fastdit.config import Config, InputError, Stopped, parse

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


def _train(arguments: argparse.Namespace) -> None:
    words = arguments.settings + arguments.overrides
    # `fastdit train key=value` without a file: the first positional is an override then
    path = words.pop(0) if words and "=" not in words[0] else None
    if arguments.resume is not None:
        words.append(f"train.resume={arguments.resume}")
    config = parse(path, words)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return
    from fastdit.train import train

    run = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"run: {run} (curves.png, metrics.jsonl, samples/, checkpoints/)")


def _sample(arguments: argparse.Namespace) -> None:
    import torch

    from fastdit.sample import run

    overrides = {key: getattr(arguments, key) for key in ("steps", "solver", "guidance") if getattr(arguments, key) is not None}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    run(
        Path(arguments.checkpoint), arguments.classes, arguments.per_class, overrides, arguments.seed, arguments.weights, dtype,
        Path(arguments.out), Path(arguments.npz) if arguments.npz else None,
    )  # fmt: skip
    print(f"picture: {arguments.out} (one row a class)")


def _export(arguments: argparse.Namespace) -> None:
    from fastdit.checkpoint import export

    out = Path(arguments.out)
    step = export(Path(arguments.checkpoint), arguments.weights, out)
    print(f"exported: {out} and {out.with_suffix('.json').name} ({arguments.weights} weights of step {step})")


def _import_base(arguments: argparse.Namespace) -> None:
    from fastdit.base_checkpoint import import_run

    parameters = Path(arguments.params) if arguments.params else None
    print(f"checkpoint: {import_run(Path(arguments.pickle), parameters, Path(arguments.out))}")


def _info(_: argparse.Namespace) -> None:
    import torch

    from fastdit import kernels
    from fastdit.engine import deepspeed_config, settle
    from fastdit.kernels import library
    from fastdit.telemetry import check_backend, device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = check_backend(device)
    for name, version in versions().items():
        print(f"{name:20} {version}")
    print(f"{'device':20} {device_name(device)}")
    built = library.EXTENSION and f"built, runs {library.INSTRUCTION_SETS[library.cpp.isa()]}"
    print(f"{'C++ extension':20} {built or 'not built: install again with a C++ compiler and FASTDIT_BUILD_EXT=1'}")
    config = settle(Config(), device)
    print(f"{'precision':20} auto is {config.train.precision} here")
    zero = deepspeed_config(config, 2)["zero_optimization"]
    overlap = "with" if zero["overlap_comm"] else "without"
    print(f"{'default ZeRO':20} stage {zero['stage']} {overlap} overlap, buckets of {zero['reduce_bucket_size']:,} elements")
    print(f"\nkernel backend on {device.type}:")
    for op in kernels.OPS:
        print(f"  {op:26} {backend}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdit", description="Train and sample flow-matching diffusion transformers.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train, or continue, a run",
        description="Train a run, or continue it where it stopped. Works alone, under `deepspeed --module` and under torchrun.",
        epilog="example: fastdit train launch/quickstart.yaml train.total_steps=1000 model.depth=8",
    )
    train.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | section.key=value", help="a YAML file first (optional), then overrides"
    )
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

    sample = commands.add_parser("sample", help="draw images from a checkpoint")
    sample.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its newest checkpoint), a checkpoint's or an exported file",
    )
    sample.add_argument(
        "--class",
        dest="classes",
        default="all",
        metavar="IDS",
        help='class ids or names such as 207,360 or "golden retriever,otter", or all (default: %(default)s)',
    )
    sample.add_argument("--per-class", type=int, default=1, metavar="N", help="images a class (default: %(default)s)")
    sample.add_argument("--steps", type=int, metavar="N", help="solver steps (default: the run's)")
    sample.add_argument("--solver", choices=("euler", "heun"), help="heun calls the model twice a step (default: the run's)")
    sample.add_argument(
        "--guidance", type=float, metavar="W", help="v = (1+W)·v(class) - W·v(null); papers' scale is 1+W (default: the run's)"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    sample.add_argument(
        "--weights",
        default="ema",
        metavar="ema|raw|ema_D",
        help="averaged, of the last step, or a decay of train.ema_more (default: ema)",
    )
    sample.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model's weights and activations (default: %(default)s)"
    )
    sample.add_argument(
        "--out", default="samples.png", metavar="PNG", help="the grid: a row a class, its first 10 images (default: %(default)s)"
    )
    sample.add_argument("--npz", metavar="NPZ", help="also write arr_0 (images uint8 [n,S,S,C]) and arr_1 (class ids)")
    sample.set_defaults(run=_sample)

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

    info = commands.add_parser("info", help="versions, device, and which backend each op uses")
    info.set_defaults(run=_info)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    # argparse takes no positional after an option behind a `nargs="*"`: overrides may come there all the same
    arguments, rest = parser.parse_known_args(words)
    arguments.overrides = rest
    if words is None and arguments.command in ("train", "sample", "encode"):
        _tune_environment()
    if rest and (arguments.command != "train" or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        arguments.run(arguments)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # one sentence, not one a rank
            print(f"fastdit: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastdit: {error}", file=sys.stderr)
        return 75  # EX_TEMPFAIL: try again
    except FloatingPointError as error:
        print(f"fastdit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastdit: interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
