# docs/resuming.md
"""Checkpoints to resume from: model, optimizer, and where the run stands in its data and metrics. Each is written aside
and then renamed, so that a run killed at any moment, saving included, leaves the one before it whole. Written by
torch.distributed.checkpoint: a run may go on with another number of ranks."""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from infra import parallel
from infra.files import full_disk, read_record


def folders(out: str | Path) -> list[Path]:
    """The checkpoints in the run folder `out`, whole or not, oldest first."""
    return sorted(Path(out).glob("checkpoints/step_*[0-9]"), key=step)


def whole(out: str | Path) -> list[Path]:
    """The whole checkpoints in the run folder `out`, oldest first."""
    return [folder for folder in folders(out) if not damage(folder)]


def latest(out: str | Path) -> Path | None:
    """The newest whole checkpoint in the run folder `out`."""
    return max(whole(out), default=None, key=step)


def damage(folder: Path) -> str | None:
    """What is missing of a checkpoint that was copied half; None for a whole one. Reads no more than its state.json, which
    has the size of every file."""
    state = read_record(folder / "state.json")
    if state is None:
        return "state.json is missing or torn"
    sizes = state.get("files", {}).items()
    wrong = [name for name, size in sizes if not (folder / name).exists() or (folder / name).stat().st_size != size]
    return f"{wrong[0]} is missing or cut" if wrong else None


def going_on(out: str | Path) -> str:
    """What to do behind a write to `out` that failed: how much is free there, what is whole, how to go on."""
    newest, free = latest(out), shutil.disk_usage(out).free / 1e9
    way = f"{newest} is whole: make room, then run the same command with --resume" if newest else "Make room, and try again"
    return f"({free:.1f} GB free there). {way}"


def step(folder: Path | None) -> int:
    """The step that a checkpoint's folder is named after; 0 for None."""
    return int(folder.name.removeprefix("step_")) if folder else 0


def learned(model, optimizer) -> dict:
    """The states of both, but for frozen weights: what --lora-rank freezes is in its base, and is not written again."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied head too
        if not parameter.requires_grad:
            model_state.pop(name, None)
    return {"model": model_state, "optimizer": optimizer_state}


def save(out: Path, model, optimizer, state: dict, keep_last: int) -> None:
    """Write OUT/checkpoints/step_NNNNNN, NNNNNN being state["step"], then delete all but the `keep_last` newest.

    Raises OSError where the disk is full or cannot be written; what was there before stays as it was."""
    folder = Path(out, "checkpoints", f"step_{state['step']:06d}")
    aside = folder.with_suffix(".partial")
    if parallel.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it saved
        aside.mkdir(parents=True)
    parallel.barrier()
    try:
        states = learned(model, optimizer)
        with _quiet():
            dcp.save(states, checkpoint_id=aside, no_dist=not dist.is_initialized())
        if parallel.rank() == 0:
            files = {path.name: path.stat().st_size for path in aside.iterdir()}
            (aside / "state.json").write_text(json.dumps(state | {"files": files}), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # one of this step that was not whole
            os.replace(aside, folder)
            for old in whole(out)[:-keep_last]:
                shutil.rmtree(old)
    except (Exception, dcp.CheckpointException) as error:
        if parallel.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"the checkpoint of step {state['step']} could not be written: {_cause(error)}") from error
    parallel.barrier()


def restore(folder: Path, model, optimizer) -> dict:
    """Load model and optimizer in place, onto any number of ranks; returns the `state` they were saved with. The optimizer
    keeps the settings that it was made with, its learning rate say: those of the command line, not the checkpoint's.

    Raises OSError where the folder cannot be read."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    loaded = learned(model, optimizer)
    try:
        with _quiet():
            dcp.load(loaded, checkpoint_id=folder, no_dist=not dist.is_initialized())
        states = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
        set_state_dict(model, optimizer, **states, options=StateDictOptions(strict=False))  # dcp.load was strict
    except torch.OutOfMemoryError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        raise OSError(_cause(error)) from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _quiet():
    """torch.distributed.checkpoint warns that there is only one process, on every call."""
    return warnings.catch_warnings(action="ignore")


def _cause(error: BaseException) -> str:
    """One line of what went wrong: dcp wraps each rank's exception in one of its own, torch.save hides the disk's."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = [type(error).__name__, *str(error).strip().splitlines()]
    return full_disk(error) or getattr(error, "strerror", None) or lines[-1]
