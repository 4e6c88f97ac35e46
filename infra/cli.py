# docs/architecture.md
"""The command line: from what was typed to a script's Args, and from an error to one line and an exit code."""

import ast
import contextlib
import inspect
import math
import os
import random
import select
import sys
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, get_type_hints

import numpy as np
import torch
import tyro
from tqdm import tqdm

from infra import checkpoint, parallel
from infra.files import full_disk


class UsageError(ValueError):
    """Something the user typed cannot work. The message names the flag and the fix. Exit code 2."""


class RunStopped(RuntimeError):
    """A run that ends before its last step for a reason that the message gives. Exit code 3."""


def run(main, args_class) -> None:
    """Parse the command line into `args_class` and call `main(args)`; a UsageError, a RunStopped or a full disk is one
    line. Under torchrun one rank's failure is reported once and ends all of them."""
    with quiet_without_reader():
        _run(main, args_class)


def _run(main, args_class) -> None:
    parallel.setup()
    sys.stdout.reconfigure(errors="backslashreplace")  # a problem's text may have what the locale has not, as stderr does
    quiet = contextlib.redirect_stderr(None) if parallel.rank() else contextlib.nullcontext()
    with quiet:  # what is wrong with the command line is wrong on every rank
        args = parse(args_class, sys.modules[main.__module__].__doc__)
    try:
        main(args)
    except (UsageError, RunStopped) as error:
        parallel.report_failure(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 3)
    except Exception as error:
        out = next(path for path in (getattr(args, "out", None), ".") if path and os.path.isdir(path))
        if reason := full_disk(error):
            parallel.report_failure(f"error: --out {out}: {reason} {checkpoint.going_on(out)}")
            sys.exit(3)
        if not isinstance(error, BrokenPipeError):
            parallel.exit_on_failure()
        raise
    parallel.barrier()  # no rank leaves while another still needs it


@contextlib.contextmanager
def quiet_without_reader():
    """Within, a reader of stdout that leaves (`| head`) ends the process without a word, as it ends other commands."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(1, 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        sys.exit(141)  # what a shell calls the end by SIGPIPE


def parse(args_class, description: str | None):
    """The command line as an `args_class`. What it inherits stands in groups of its own in --help, one for each base class,
    titled by it; the flags are flat all the same."""
    classes = [c for c in args_class.__mro__ if is_dataclass(c)]  # its own first
    if len(classes) == 1:
        return tyro.cli(args_class, description=description)
    base = {name: c for c in classes for name in c.__annotations__}  # where a field stands first: its group
    last = {name: c for c in reversed(classes) for name in c.__annotations__}  # where it stands last: its text
    members = {c: [] for c in classes}
    for one in fields(args_class):
        of = last[one.name]
        annotation = Annotated[get_type_hints(of)[one.name], tyro.conf.arg(help=docstrings(of)[one.name])]
        members[base[one.name]].append((one.name, annotation, field(default=one.default)))
    groups = {}
    for c, found in members.items():
        title = "algorithm" if c is args_class else c.__name__.removesuffix("Args").lower()
        groups[title] = make_dataclass(c.__name__, found, kw_only=True)
        groups[title].__doc__ = None if c is args_class else c.__doc__
    typed = tyro.cli(make_dataclass("Flags", groups.items()), description=description, config=(tyro.conf.OmitArgPrefixes,))
    return args_class(**{name: value for group in groups for name, value in vars(getattr(typed, group)).items()})


def docstrings(args_class) -> dict[str, str]:
    """{field: the string under it} of a dataclass, from its source."""
    [body] = [n.body for n in ast.parse(inspect.getsource(args_class)).body]
    pairs = zip(body, body[1:], strict=False)
    pairs = [pair for pair in pairs if isinstance(pair[0], ast.AnnAssign) and isinstance(pair[1], ast.Expr)]
    return {a.target.id: inspect.cleandoc(b.value.value) for a, b in pairs}


def require(condition, message: str) -> None:
    """Raise UsageError(message) unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_positive(args, names: str) -> None:
    """Raise UsageError unless each of the named fields of `args` (separated by spaces) is above 0 or not given (None)."""
    for name in names.split():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')} {value}"
        require(value is None or value > 0, f"{flag}: must be above 0")
        require(value is None or math.isfinite(value), f"{flag}: must be finite")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def progress_bar(total: int, name: str, unit: str) -> tqdm:
    """A bar on a terminal; a line every so often in a log file."""
    often = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc=name, unit=unit, delay=0.1, mininterval=often, disable=parallel.rank() > 0)
