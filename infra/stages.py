# docs/bridge.md
"""Running the stages of a bridge: commands that are printed, run, skipped where they are finished, and killed with it."""

import ctypes
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

from infra import checkpoint
from infra.cli import require

ROOT = Path(__file__).parent.parent
LIBC = ctypes.CDLL(None)


def call(command: str, nproc: int = 1, log: Path | None = None) -> None:
    """Print and run one command, under torchrun for several processes; its exit code, unless 0, is this one's."""
    script, *flags = shlex.split(command)
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else ["python"]
    print(f"\n$ {shlex.join([*launcher, script, *flags])}" + (f"\n  > {log}" if log else ""), flush=True)
    launcher = ["-m", "torch.distributed.run", *launcher[1:]] if nproc > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *flags]
    with open(log, "a", encoding="utf-8") if log else nullcontext() as output:
        code = subprocess.run(command, stdout=output, stderr=output, preexec_fn=end_with_parent).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] if log else []
        print(*last, f"error: {script} ended with exit code {code}; the same bridge.py command continues from here",
              sep="\n", file=sys.stderr)  # fmt: skip
        sys.exit(code)


def end_with_parent() -> None:
    """In a child process: end when bridge.py is killed, so that the next one finds no stage still writing (Linux only)."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(folder: Path, done: str, command: Callable[[], str], inputs: list[Path], nproc: int, log: Path | None) -> None:
    """Run what `command()` says; skip it when FOLDER/`done`, the file it writes last, says that it finished.

    Raises UsageError if what is there was made by another command, or before one of the `inputs` (run folders)."""
    typed = shlex.join(["python", *shlex.split(command())])
    record = json.loads((folder / done).read_text(encoding="utf-8")) if (folder / done).exists() else {"finished": False}
    finished = record.get("finished", True)
    made = folder / done if finished else checkpoint.latest(folder)  # a stage that was stopped goes on from its checkpoint
    if made:
        require(record["command"] == typed, f"{folder}: holds `{record['command']}`; delete it, or choose another --out")
        newer = [i for i in inputs if (path := i / "run.json").exists() and path.stat().st_mtime > made.stat().st_mtime]
        require(
            not newer,
            f"{folder}: older than {', '.join(map(str, newer))}, which it was made from; delete it to make it again",
        )
    if finished:
        print(f"# finished before: {typed}", flush=True)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        call(typed.removeprefix("python "), nproc, log)


def run_all(tasks: dict, jobs: int) -> None:
    """tasks: {name: (names of the tasks it waits for, all before it in the dict, function)}. `jobs` at a time, in order;
    behind a failure none is started, and the first one is raised when those at work have ended."""
    futures, failed = {}, []

    def work(needs, function):
        try:
            if not any(futures[need].exception() for need in needs) and not failed:
                function()
        except BaseException as error:
            failed.append(error)
            raise

    pool = ThreadPoolExecutor(jobs)
    try:
        for name, (needs, function) in tasks.items():
            futures[name] = pool.submit(work, needs, function)
        for future in as_completed(futures.values()):
            future.result()
    finally:
        failed.append(None)  # also when the user interrupts
        pool.shutdown(cancel_futures=True)
