# docs/run_folder.md
"""The run folder, its record of what a run was and cost, and the rules that stop a run."""

import fcntl
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from infra import checkpoint, parallel
from infra.cli import RunStopped, UsageError, progress_bar, require
from infra.dataset import ProblemStream, load_problems
from infra.models import save_model

PACKAGES = ("torch", "transformers", "vllm", "datasets", "numpy", "tyro", "math-verify")


def make_out(out: str | Path) -> Path:
    """The output folder, made if need be. Raises UsageError where nothing can be written."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error.strerror}); choose another folder") from None
    return Path(out)


def finished(out: str | Path) -> dict | None:
    """run.json of a finished run in folder `out`, else None."""
    path = Path(out) / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record if record.get("finished") else None


class Run:
    """The run folder: metrics.jsonl (one object a step), run.json, a copy of the script, checkpoints, a progress bar.
    Rank 0 writes it; the other ranks keep the same books and write nothing."""

    def __init__(self, args, total_steps: int):
        if args.resume and finished(args.out):  # a requeued job: the same line finds nothing left to do
            require_same_run(args, Path(args.out))
            print(f"{args.out}/ is finished")
            sys.exit(0)
        require(not finished(args.out), f"--out {args.out}: holds a finished run; choose another folder or delete it")
        self.args, self.out, self.start = args, make_out(args.out), time.time()
        self.total_steps = total_steps
        self.resumed_from = checkpoint.latest(self.out)
        worth = [path for path in (self.resumed_from, *self.out.glob("rollouts*.jsonl")) if path]
        require(
            args.resume or not worth,
            f"--out {args.out}: holds an unfinished run ({', '.join(path.name for path in worth)}); go on with it by "
            f"--resume, or choose another folder",
        )
        if worth:
            require_same_run(args, self.out)
        self.labels = set()  # keys of the problems whose reference answer was consulted for a reward
        columns, self.label_split = (args.prompt_column, args.answer_column), None
        if args.label_split:
            self.label_split = {p.key for p in load_problems(args.label_split, "--label-split", True, *columns)}
        self.spent = Counter()  # optimizer updates, sampled tokens, FLOPs
        self.record = {
            "finished": False,
            "command": command_line(),
            "args": asdict(args),
            "preflight": None,
            "stopped": None,
            "git_revision": git_revision(),
            "packages": {name: version(name) for name in PACKAGES},
            "hardware": {
                "cpu": platform.processor() or platform.machine(),
                "cpu_threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "ranks": parallel.world_size(),
            },
        }
        self.metrics = self.bar = self.tensorboard = self.wandb = None
        parallel.barrier()  # every rank has looked at the folder before rank 0 writes to it
        if parallel.rank():
            return
        self.lock = lock_folder(self.out)
        shutil.copy(sys.argv[0], self.out)
        self._write_record()
        last_step = checkpoint.step(self.resumed_from)
        keep_metrics(self.out, last_step)
        self.metrics = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = progress_bar(total_steps, self.out.name, "step")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard needs a package: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(self.out, purge_step=last_step + 1)
        if args.wandb:
            try:
                import wandb
            except ImportError:
                raise UsageError("--wandb needs a package: pip install wandb") from None
            self.wandb = wandb.init(project="sparse-to-dense", name=self.out.name, config=asdict(args))

    def resume(self, model, optimizer, stream: ProblemStream) -> int:
        """Load the newest checkpoint, if there is one, into all three. Returns its step, else 0."""
        if not self.resumed_from:
            return 0
        state = checkpoint.restore(self.resumed_from, model, optimizer)
        stream.position, self.labels, self.spent = state["position"], set(state["labels"]), Counter(state["spent"])
        print(f"resumed from {self.resumed_from}")
        return state["step"]

    def checkpoint(self, step: int, model, optimizer, stream: ProblemStream) -> None:
        """Every --save-every steps, except behind the last one: what `resume` needs. Raises RunStopped if the disk is
        full."""
        if not self.args.save_every or step % self.args.save_every or step == self.total_steps:
            return
        state = {"step": step, "position": stream.position, "labels": sorted(self.labels), "spent": self.spent}
        try:
            checkpoint.save(self.out, model, optimizer, state, self.args.keep_last)
        except OSError as error:
            whole, free = checkpoint.latest(self.out), shutil.disk_usage(self.out).free / 1e9
            raise RunStopped(
                f"--out {self.out}: {error} ({free:.1f} GB free there). "
                + (f"{whole} is whole: make room, then run the same command with --resume" if whole else "Make room")
            ) from None

    def consult(self, problems) -> None:
        """Enter problems into the ledger before their answers decide a reward. Raises RunStopped for one that is not in
        --label-split."""
        keys = {problem.key for problem in problems}
        outside = keys - self.label_split if self.label_split is not None else set()
        if outside:
            reason = f"a label outside --label-split {self.args.label_split}: {min(outside)[:80]!r}"
            self.note(stopped=reason)
            raise RunStopped(f"{self.out}: {reason}; nothing was learned from it. Take --train-data from that file")
        self.labels |= keys

    def spend(self, updates: int = 0, sampled_tokens: int = 0, flops: float = 0) -> None:
        """Count what training costs, for run.json. FLOPs are 2 a parameter and token forward and 4 more backward, attention
        itself left out (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
        self.spent.update(updates=updates, sampled_tokens=sampled_tokens, flops=flops)

    def over(self, max_flops: float | None) -> bool:
        """Whether that many FLOPs are spent; never for None."""
        return max_flops is not None and self.spent["flops"] >= max_flops

    def note(self, **entries) -> None:
        """Add entries to run.json."""
        self.record |= entries
        if parallel.rank() == 0:
            self._write_record()

    def _write_record(self):
        (self.out / "run.json").write_text(json.dumps(self.record, indent=2), encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float], watched: str | None = None) -> None:
        """Append one object to metrics.jsonl. `watched` is the metric to show behind the progress bar."""
        if parallel.rank():
            return
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics.flush()
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if watched:
            shown = f"{watched.split('/')[1]} {metrics.get(watched, float('nan')):.4f}, "
            shown += f"{metrics['charts/response_length']:.0f} tokens, {metrics['charts/tokens_per_sec']:.0f} tok/s"
            self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def finish(self, model=None, tokenizer=None, dtype=None, **extra) -> None:
        """Save the model (if one is given), then mark run.json finished: the last write of a run. Nothing is left to
        resume, so the checkpoints go."""
        if model is not None:
            save_model(model, tokenizer, self.out, dtype)
        if parallel.rank():
            return
        self.bar.close()
        self.metrics.close()
        (self.out / "labels.json").write_text(json.dumps(sorted(self.labels)), encoding="utf-8")
        self.record |= {
            "finished": True,
            "wall_time_s": round(time.time() - self.start, 1),
            "labels_used": len(self.labels),
            "updates": self.spent["updates"],
            "sampled_tokens": self.spent["sampled_tokens"],
            "flops": self.spent["flops"],
            **extra,
        }
        self._write_record()
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        print(f"wrote {self.out}/ in {self.record['wall_time_s']:.0f} s")


def lock_folder(out: Path):
    """An open file that keeps other processes out of `out` until this one ends. Raises UsageError if one is at work."""
    file = (out / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"--out {out}: another process is writing there; wait for it, stop it, or choose another") from None
    return file


def rank_zero_file(path: Path, lines: list[str]):
    """`path` open for writing, holding `lines`; on the other ranks what is written goes nowhere."""
    file = open(os.devnull if parallel.rank() else path, "w", encoding="utf-8")
    file.writelines(lines)
    return file


def require_same_run(args, out: Path) -> None:
    """Raise UsageError if the run in `out` was started with another model, other data or another seed; print whatever
    else is new."""
    before, now = json.loads((out / "run.json").read_text(encoding="utf-8"))["args"], json.loads(json.dumps(asdict(args)))
    changed = {name: f"--{name.replace('_', '-')} was {before.get(name)}, now {now[name]}" for name in now}
    changed = {name: text for name, text in changed.items() if before.get(name) != now[name] and name != "resume"}
    fixed = [changed[name] for name in ("model", "teacher", "student", "train_data", "rollouts", "seed") if name in changed]
    require(not fixed, f"--resume: {'; '.join(fixed)}: repeat the flags of {out}, or choose another --out")
    if changed:
        print(f"--resume with changed flags: {'; '.join(changed.values())}")


def keep_metrics(out: Path, last_step: int) -> None:
    """Cut metrics.jsonl behind `last_step`, the step to go on from: later rows are of steps that run again."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and last_step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    path.write_text("".join(kept), encoding="utf-8")


class StopRules:
    """Ends a run that goes wrong: the weights are saved, run.json says why and stays unfinished. Every rank must see the
    same values, because all of them save."""

    def __init__(self, args, run, model, tokenizer, dtype):
        self.args, self.saved, self.run, self.steps_truncated = args, (model, tokenizer, run.out, dtype), run, 0

    def unless_finite(self, step: int, **values) -> None:
        """Stop at a nan or inf. Called before the optimizer's step, so that it never reaches the weights that are saved."""
        bad = {name: float(value) for name, value in values.items() if not math.isfinite(value)}
        if bad:
            names = " and ".join(f"{name} {value}" for name, value in bad.items())
            self.stop(
                f"step {step}: {names}; the update was not applied. Lower --learning-rate, or look at the step's data "
                f"and at --dtype"
            )

    def if_truncated(self, step: int, truncated_frac: float) -> None:
        """Stop after --stop-patience steps in a row with a truncated_frac above --stop-truncated-frac (0: never)."""
        bound, patience = self.args.stop_truncated_frac, self.args.stop_patience
        self.steps_truncated = self.steps_truncated + 1 if bound and truncated_frac > bound else 0
        if bound and self.steps_truncated >= patience:
            self.stop(
                f"step {step}: charts/truncated_frac above {bound:g} for {patience} steps: responses do not end. Raise "
                f"--max-response-tokens, check the EOS ids with --preflight-only, or set --stop-truncated-frac 0"
            )

    def watch(self, sampler) -> None:
        """Stop when the sampler's canary finds, within a rollout, that it does not sample from the trainer's weights."""
        sampler.on_stale = self.stop

    def stop(self, reason: str) -> None:
        save_model(*self.saved)
        self.run.note(stopped=reason)
        raise RunStopped(f"stopped at {reason}. Saved the weights so far to {self.run.out}/")


def command_line() -> str:
    """The command that runs this process, as a user would type it in the repository."""
    script = os.path.relpath(Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent)
    return shlex.join(["python", script, *sys.argv[1:]])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except OSError:
        return None
