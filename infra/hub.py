# docs/architecture.md
"""What comes from the Hugging Face hub or its cache: tried again where a failure may pass, explained where it may not."""

import functools
import re
import sys
import time
from pathlib import Path

from safetensors import safe_open

from infra.cli import UsageError

RETRY_WAITS = (1, 3)  # seconds between tries of a hub that fails, on top of its client's own


@functools.cache
def go_offline_without_network() -> None:
    """Without a network the hub's clients retry for minutes; offline, they read their caches or fail at once."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for last in (False, True):
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
            return
        except Exception:  # requests' or httpx's, by version
            time.sleep(0 if last else RETRY_WAITS[0])
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def from_hub(load, path: str):
    """load(), tried again a few times where the hub, or the way to it, failed for a reason that may pass."""
    from huggingface_hub import constants

    if Path(path).exists():
        return load()
    go_offline_without_network()
    for wait in (*RETRY_WAITS, None):
        try:
            return load()
        except Exception as error:
            if wait is None or constants.HF_HUB_OFFLINE or not may_pass(error):
                raise
            print(f"{path}: {first_line(error)}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is a failed connection or a busy server: not a wrong name or token."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search("Timeout|Connect|Protocol", type(error).__name__):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def explain_missing(flag: str, path: str, error: Exception) -> UsageError:
    """One line for a checkpoint or its tokenizer that a library cannot read."""
    if "custom code" in str(error):
        return UsageError(f"{flag} {path}: brings its own code, which is never run; use a Qwen or Llama checkpoint")
    for file in sorted(Path(path).glob("*.safetensors")):  # the library names no file
        try:
            safe_open(file, "pt").__exit__(None, None, None)
        except Exception as damage:
            return UsageError(f"{flag} {path}: cannot load it: {file.name} is damaged ({first_line(damage)}); copy it again")
    return UsageError(
        f"{flag} {path}: cannot load it as a local checkpoint folder or from the Hugging Face hub "
        f"({type(error).__name__}: {first_line(error)}). Check the path, or the network and the hub id"
    )
