"""What the Hugging Face Hub says of a repository, within a few seconds: a cluster's compute nodes often cannot reach it."""

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

TIMEOUT_S = 4.0  # until the Hub has answered


def model_info(repository: str, revision: str | None) -> "ModelInfo":
    """Ask the Hub about a repository, OWNER/NAME, and return its answer.

    Raises what huggingface_hub raises, of two HTTP libraries by version, or TimeoutError after TIMEOUT_S.
    """
    from huggingface_hub import HfApi

    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S))
        except Exception as error:  # raised below
            answer.set_exception(error)

    # a thread, because no timeout bounds the resolution of names, and that of a connection is for each address of a name
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not answer.done():
        raise TimeoutError(f"no answer in {TIMEOUT_S:.0f} s")
    return answer.result()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type, as a part of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
