# docs/resuming.md
"""Files that are read again, and disks that are full."""

import errno
import json
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on one file


def write_aside(path: str | Path, content: str | bytes) -> None:
    """Write `path`, whole or not at all: aside, then renamed, so that a kill or a full disk leaves what was there before.
    Text is UTF-8."""
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def append(path: str | Path, text: str) -> None:
    """Add `text` at the end of a file. It is closed before this returns or raises, so that no later write is tried."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def whole_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl file, none if there is no file. What a kill or a full disk has torn is left out, with a line."""
    rows, torn = [], 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n") if Path(path).exists() else []:
        try:
            rows += [json.loads(line)] if line.strip("\0 \r") else []
        except ValueError:
            torn += 1
    if torn:
        print(f"{path}: {torn} torn rows left out")
    return rows


def read_record(path: str | Path) -> dict | None:
    """The JSON object in `path`; None where it is missing or torn."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def full_disk(error: BaseException | None) -> str | None:
    """What the system says of a full disk, if that is what `error`, or what it was raised from, is about; else None.
    safetensors and torch raise errors of their own, with the system's words in them."""
    while error is not None:
        for number in FULL:
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
