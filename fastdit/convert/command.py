"""`fastdit import`, and `fastdit import-base` for one of its formats: checkpoints of other projects become runs."""

import argparse

from fastdit.config import InputError
from fastdit.files import path_argument

FORMATS = {
    "base": "the published base model's model_Ns.pkl, with the autoencoder in it",
    "sit": "the published SiT or REPA",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastdit import`."""
    parser.description = (
        "Convert a checkpoint of another project to a run, from which `fastdit sample --checkpoint DIR` draws. Code in the file is "
        "refused and never run."
    )
    parser.add_argument(
        "source", type=path_argument, metavar="FILE", help="File that torch.save wrote: model_Ns.pkl, or a .pt of SiT or REPA."
    )
    parser.add_argument(
        "--format", choices=FORMATS,
        help=f"Format of the file: {'; '.join(f'{name} ({text})' for name, text in FORMATS.items())}. `import-base` is "
        "`import --format base`.",
    )  # fmt: skip
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="Folder of the run to make.")
    parser.add_argument(
        "--params", type=path_argument, metavar="JSON", help="Parameters of a base model (default: model_params_Ns.json beside it)."
    )
    parser.add_argument(
        "--data-at", type=int, choices=(0, 1),
        help="Timestep at which a SiT sees data without noise: 1 as in SiT, 0 as in REPA (default: 0 if the file holds REPA's "
        "projectors, 1 if the model has SiT's 8 output channels).",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> str:
    """Convert, and return the folder of the checkpoint and what was converted as text. Raises InputError."""
    kind = arguments.format or ("base" if arguments.command == "import-base" else None)
    if kind is None or (arguments.command == "import-base" and kind != "base"):
        raise InputError(f"fastdit {arguments.command} --format {kind}: use fastdit import with --format {' or '.join(FORMATS)}")
    wrong = {"base": "data_at", "sit": "params"}[kind]
    if getattr(arguments, wrong) is not None:
        raise InputError(f"--{wrong.replace('_', '-')} is not for --format {kind}: leave it out")
    if kind == "base":
        from fastdit.convert import base

        return f"checkpoint: {base.import_run(arguments.source, arguments.params, arguments.out)}"
    from fastdit.convert import sit

    folder, notes = sit.import_run(arguments.source, arguments.data_at, arguments.out)
    return "\n".join((f"checkpoint: {folder}", *notes))
