# docs/bridge.md
"""Running the stages of a bridge: commands that are printed, run, skipped where they are finished, and killed with it."""

import ctypes
import importlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import MISSING, fields
from itertools import takewhile
from pathlib import Path

import tyro

from infra import checkpoint
from infra.cli import UsageError, require
from infra.digest import digest_of
from infra.files import read_record

ROOT = Path(__file__).parent.parent
FORCE = " --force"  # lets a stage begin and changes nothing in it, so it may be given later, or not any more
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


def parsed(name: str, script: str, flags: str):
    """The Args of `script` for the `flags` that bridge.py's flag `name` holds. Raises UsageError for one that it does not
    have: before the first stage and not at the last."""
    args_class = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args
    models = [f"--{one.name}=x" for one in fields(args_class) if one.default is MISSING]
    try:
        return tyro.cli(args_class, args=[*models, *shlex.split(flags)])
    except SystemExit:
        raise UsageError(f"--{name.replace('_', '-')} {flags!r}: not flags of {script}, as said above") from None


def end_with_parent() -> None:
    """In a child process: end when bridge.py is killed, so that the next one finds no stage still writing (Linux only)."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(folder: Path, done: str, command: Callable[[], str], nproc: int, log: Path | None) -> None:
    """Run what `command()` says; skip it when FOLDER/`done`, the file it writes last, says that it finished.

    Raises UsageError if what is there was made by another command, or from inputs that hold something else by now. The
    folder may have been moved or copied since."""
    typed = shlex.join(["python", *shlex.split(command())])
    record = read_record(folder / done) or {"finished": False}
    finished = record.get("finished", True)
    newest = None if finished else checkpoint.latest(folder)  # a stage that was stopped goes on from there
    if newest:
        record = {"command": typed} | record | read_record(newest / "state.json").get("run", {})
    if finished or newest:
        same = relocated(record["command"], typed).replace(FORCE, "") == typed.replace(FORCE, "")
        require(same, f"{folder}: holds `{record['command']}`; delete it, or choose another --out")
        beside = sorted(folder.glob(f"*/{Path(done).name}")) if "/" in done else []  # of every benchmark
        for one in [record, *map(read_record, beside)]:
            require_same_inputs(folder, typed, one or {})
    if finished:
        print(f"# finished before: {typed}", flush=True)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        call(typed.removeprefix("python "), nproc, log)


def require_same_inputs(folder: Path, typed: str, record: dict) -> None:
    """Raise UsageError if an input of the command `typed` is not what the `record` of its run says."""
    for name, digest in record.get("inputs", {}).items():
        flag, specs = f"--{name.replace('_', '-')}", values_of(typed, name)
        now = {digest_of(spec) for spec in specs} - {None}
        require(
            digest is None or not now or digest in now,
            f"{folder}: was made when {flag} {' '.join(specs)} held something else; delete it to make it again",
        )


def values_of(command: str, name: str) -> list[str]:
    """What stands behind the last --name of a command, be it one thing or several (--names)."""
    tokens = shlex.split(command)
    at = [i for i, token in enumerate(tokens) if token in (flag := f"--{name.replace('_', '-')}", f"{flag}s")]
    behind = tokens[at[-1] + 1 :] if at else []
    return list(takewhile(lambda token: not token.startswith("--"), behind))


def relocated(command: str, typed: str) -> str:
    """`command` with the paths that it would have in the folder of `typed`, if it is the same but for where that lies."""
    was, now = (Path(*values_of(one, "out")[-1:]) for one in (command, typed))
    while was.name and was.name == now.name:
        was, now = was.parent, now.parent
    inside = re.compile(rf"^{re.escape(str(was))}(?=/|$)")
    return shlex.join(inside.sub(lambda _: str(now), token) for token in shlex.split(command))


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
