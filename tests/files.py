"""Which files the tests are about: a reader's own copy of a script must not turn them red."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked(pattern: str) -> list[str]:
    """Files that git knows: a reader's copy of a script is none of them. Without git, all there are."""
    command = ["git", "-C", str(ROOT), "ls-files", "--", f":(glob){pattern}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        found = []
    return [f for f in found if (ROOT / f).exists()] or sorted(str(f.relative_to(ROOT)) for f in ROOT.glob(pattern))
