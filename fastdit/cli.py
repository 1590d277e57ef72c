"""The command line: a table of commands, each in a module that has `add_arguments(parser)` and `run(arguments)`.

Only the module of the given command is imported, so that `fastdit --help` and `fastdit prepare` need no torch. `run` returns the
text that rank 0 prints at the end, or None.

Exit codes: 0; 1 for a run that diverged or samples that are not finite; 2 for bad input, after one sentence; 75 after SIGTERM, when
the run was saved; 130 after Ctrl-C; 141 if the reader of stdout or stderr has gone. FASTDIT_NO_REEXEC=1 skips the restart that
gives glibc's allocator its settings, which debuggers and profilers may not follow.
"""

import argparse
import importlib
import os
import select
import sys
from typing import NamedTuple

from fastdit import __version__
from fastdit.config import InputError, Interrupted, Stopped

# Huge pages, and freed memory is kept for the next step: without them a step on a CPU spends 8-12 % in page faults and TLB misses.
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"

# Read when CUDA and NCCL start: freed memory serves other shapes too; a collective that times out leaves a trace of all ranks.
CUDA_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}  # fmt: skip


class Command(NamedTuple):
    """A command of `fastdit`: the module that holds it, its line in `fastdit --help`, and whether it runs a model.

    interrupted: what Ctrl-C left, the end of a sentence.
    """

    module: str
    help: str
    runs_model: bool = False
    interrupted: str = "nothing was written"


COMMANDS = {
    "train": Command(
        "fastdit.training.command", "Train a model, or resume a run that was stopped.", True,
        "the same command continues from the newest checkpoint, or begins again if there is none",
    ),
    "sample": Command(
        "fastdit.sampling.command", "Draw images from a checkpoint.", True,
        "there is no half-written file; with --npz the same command resumes",
    ),
    "evaluate": Command(
        "fastdit.evaluation.command", "Measure FID, KID, Inception score, precision and recall.", True, "no result was written"
    ),
    "sweep": Command(
        "fastdit.evaluation.sweep", "Evaluate a checkpoint over guidance, steps, EMA decays, …", True,
        "the table holds the settings that were finished",
    ),
    "export": Command("fastdit.checkpoint", "Write the weights of a checkpoint to one safetensors file."),
    "import": Command("fastdit.convert.command", "Convert a published SiT, REPA or base model to a run."),
    "import-base": Command("fastdit.convert.command", "Convert a checkpoint of the published base model."),
    "prepare": Command(
        "fastdit.data.prepare", "Index the images of archives or folders, without unpacking them.", False,
        "the same command resumes with what is not scanned yet",
    ),
    "encode": Command(
        "fastdit.data.encode", "Encode the images of an index to latents.", True,
        "the same command resumes with the shards that are missing",
    ),
    "plan": Command("fastdit.planning.plan", "Predict the FLOPs, memory, hours and cost of a run."),
    "doctor": Command("fastdit.planning.doctor", "Measure this machine and name what slows a run down.", True),
    "info": Command("fastdit.planning.info", "Show versions, the device and the kernel backend of each op."),
}  # fmt: skip


START = """start with the built-in digits (`fastdit COMMAND --help` describes a command):
  fastdit train
  fastdit sample --checkpoint runs/digits
  fastdit evaluate runs/digits --features digits"""


class HelpFormatter(argparse.HelpFormatter):
    """Keeps line breaks in descriptions, and does not wrap indented lines, which are example commands."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)
        self._action_max_length = 16  # argparse leaves the indentation of commands out of their widths

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super()._fill_text
        return "\n".join(line if line.startswith(" ") else wrap(line, width, indent) for line in text.splitlines())


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the arguments of the one that is given."""
    parser = argparse.ArgumentParser(
        "fastdit", description="Train flow-matching diffusion transformers, and sample from them.", epilog=START,
        formatter_class=HelpFormatter, add_help=False,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    parser.add_argument("--version", action="version", version=f"fastdit {__version__}", help="Show the version and exit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (module, text, *_) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, formatter_class=HelpFormatter, add_help=False)
        subparser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        if name == command:
            holder = importlib.import_module(module)
            holder.add_arguments(subparser)
            subparser.set_defaults(run=holder.run)
    return parser


def _tune_environment() -> None:
    """Set what CUDA and glibc's allocator read, unless the user did. glibc reads GLIBC_TUNABLES once, at the start: this process
    starts again with it, which takes 20 ms before anything is imported."""
    for name, value in CUDA_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and os.environ.get("FASTDIT_NO_REEXEC") != "1":
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Open what the caller closed (`>&-`) on the null device: the next file that is opened would become stdout or stderr."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < descriptor:  # descriptor 0 is closed as well
                pass
            setattr(sys, name, os.fdopen(opened, "w"))


def _readers_gone() -> bool:
    """Return whether the reader of stdout or stderr has gone. If so, what is still to be written goes to the null device."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more at the end
                gone = True
        except (OSError, ValueError):  # not a stream of the system, as in tests
            continue
    return gone


def _print(text: str) -> None:
    """Print to stdout, whole. Raises InputError if it is a file on a full disk."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        raise InputError(f"stdout cannot be written: {error.strerror}: free some space") from error


def _is_first_rank() -> bool:
    """Return whether this process speaks for all ranks. A RANK that is no number is an error, which somebody must say."""
    rank = os.environ.get("RANK", "")
    return not rank.isdecimal() or int(rank) == 0


def _say(text: str) -> None:
    """Print a sentence to stderr, on one rank only."""
    if _is_first_rank():
        print(f"fastdit: {text}", file=sys.stderr, flush=True)


def _run(given: list[str]) -> int:
    """Run a command and return its exit code; without a command, print the help or complain, and raise SystemExit."""
    command = given[0] if given and given[0] in COMMANDS else None
    try:
        parser = make_parser(command)
        # argparse takes no positional argument after an option behind a `nargs="*"`: overrides may come there all the same
        arguments, rest = parser.parse_known_args(given)
        if rest and ("settings" not in arguments or any(word.startswith("-") or "=" not in word for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            arguments.settings += rest
        text = arguments.run(arguments)
        if text is not None and _is_first_rank():
            _print(text)
    except InputError as error:
        _say(str(error))
        return 2
    except Stopped as error:
        _say(str(error))
        return 130 if isinstance(error, Interrupted) else 75  # EX_TEMPFAIL: try again
    except FloatingPointError as error:  # raised on all ranks
        _say(str(error))
        return 1
    return 0


def main(words: list[str] | None = None) -> int:
    """Run a command and return its exit code. words: the command and its arguments (default: those of this process)."""
    given = sys.argv[1:] if words is None else words
    command = COMMANDS.get(given[0]) if given else None
    try:
        if words is None:
            _open_streams()
            if command and command.runs_model:
                _tune_environment()
        try:
            return _run(given)
        finally:  # here: after the end of this function nothing handles a BrokenPipeError
            sys.stdout.flush()
            sys.stderr.flush()
    except KeyboardInterrupt:
        _say(f"interrupted; {command.interrupted}" if command else "interrupted")
        if words is None:
            os._exit(130)  # at once: threads and other ranks are not waited for
        return 130
    except BrokenPipeError:
        if _readers_gone():
            return 141
        raise


if __name__ == "__main__":
    sys.exit(main())
