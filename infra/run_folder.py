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
from itertools import takewhile
from pathlib import Path

import torch

from infra import checkpoint, parallel
from infra.cli import RunStopped, UsageError, progress_bar, require
from infra.dataset import ProblemStream, load_problems
from infra.digest import digests
from infra.files import append, read_record, whole_rows, write_aside
from infra.models import save_model, try_save, weight_bytes

PACKAGES = ("torch", "transformers", "vllm", "peft", "datasets", "numpy", "tyro", "math-verify")
# a run goes on with the same
FIXED = ("model", "teacher", "student", "train_data", "rollouts", "paced", "grader", "seed", "lora_rank", "lora_alpha")
# and with these, where rollouts that they made are kept
SAMPLED = ("rollouts_per_prompt", "max_response_tokens", "temperature", "instruction", "teacher_thinking", "prompt_column",
           "max_prompt_tokens", "sampler", "dtype")  # fmt: skip


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
    record = read_record(Path(out) / "run.json") or {}
    return record if record.get("finished") else None


def recorded(out: str | Path) -> dict | None:
    """run.json of a run in folder `out`; where that is missing or torn, as the newest checkpoint has it; else None."""
    path, newest = Path(out) / "run.json", checkpoint.latest(out)
    record = read_record(path)
    if record is None and newest and (record := read_record(newest / "state.json").get("run")):
        print(f"{path} cannot be read: taken from {newest}")
    return record


class Run:
    """The run folder: metrics.jsonl (one object a step), run.json, a copy of the script, checkpoints, a progress bar.
    Rank 0 writes it; the other ranks keep the same books and write nothing. `problems`, in order, are known again by what
    they hold, as all inputs are: docs/resuming.md has what is compared."""

    def __init__(self, args, total_steps: int, problems=None):
        inputs = digests(args, problems)
        if args.resume and (record := finished(args.out)):  # a requeued job: the same line finds nothing left to do
            require_same_run(args, inputs, record)
            steps = record.get("steps", total_steps)
            require(
                steps == total_steps,
                f"--resume: {args.out} is finished, with {steps} steps, and now {total_steps} are asked for; its optimizer "
                f"is gone, so start a new run from the weights, with another --out",
            )
            print(f"{args.out}/ is finished")
            sys.exit(0)
        require(not finished(args.out), f"--out {args.out}: holds a finished run; choose another folder or delete it")
        self.args, self.out, self.start = args, make_out(args.out), time.time()
        self.total_steps = total_steps
        self.resumed_from = checkpoint.latest(self.out)
        newest = max(checkpoint.folders(self.out), default=None, key=checkpoint.step)
        if newest != self.resumed_from:
            found = f"{newest} is not whole ({checkpoint.damage(newest)})"
            require(self.resumed_from, f"--out {args.out}: {found}; copy it again, or choose another folder")
            print(f"{found}: the newest whole one is {self.resumed_from}")
        worth = [path for path in (self.resumed_from, *self.out.glob("rollouts*.jsonl")) if path]
        require(
            args.resume or not worth,
            f"--out {args.out}: holds an unfinished run ({', '.join(path.name for path in worth)}); go on with it by "
            f"--resume, or choose another folder",
        )
        if worth:
            before = recorded(self.out)
            require(
                before,
                f"--out {args.out}: holds {worth[-1].name} and no run.json that can be read, which would say what made it; "
                f"give it as --rollouts, or choose another folder",
            )
            require_same_run(args, inputs, before)
        self.labels = set()  # keys of the problems whose reference answer was consulted for a reward
        columns, self.label_split = (args.prompt_column, args.answer_column), None
        if args.label_split:
            self.label_split = {p.key for p in load_problems(args.label_split, "--label-split", True, *columns)}
        self.spent = Counter()  # optimizer updates, sampled tokens, FLOPs
        self.record = {
            "finished": False,
            "command": command_line(),
            "args": asdict(args),
            "inputs": inputs,
            "steps": total_steps,
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
        self.bar = self.tensorboard = self.wandb = None
        parallel.barrier()  # every rank has looked at the folder before rank 0 writes to it
        if parallel.rank():
            return
        self.lock = lock_folder(self.out)
        script = Path(sys.argv[0])
        if script.is_file() and script.resolve() != (self.out / script.name).resolve():
            write_aside(self.out / script.name, script.read_bytes())  # a fresh file: the script's may be read-only
        self._write_record()
        last_step = checkpoint.step(self.resumed_from)
        keep_metrics(self.out, last_step)
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
        try:
            state = checkpoint.restore(self.resumed_from, model, optimizer)
        except OSError as error:
            older = [str(one) for one in checkpoint.whole(self.out) if one != self.resumed_from][-1:]
            raise RunStopped(
                f"{self.resumed_from}: cannot be read ({error}). Copy it again, or delete it: --resume then "
                + (f"goes on from {older[0]}" if older else "starts from the beginning")
            ) from None
        require(
            state["step"] <= self.total_steps,
            f"--resume: {self.resumed_from} is beyond the {self.total_steps} steps asked for; raise --max-steps or --epochs",
        )
        stream.position, self.spent = state["position"], Counter(state["spent"])
        self.labels = set(state["labels"])
        outside = self.labels - self.label_split if self.label_split is not None else None
        require(not outside, f"--label-split {self.args.label_split}: the run has consulted labels outside of it already")
        print(f"resumed from {self.resumed_from}")
        return state["step"]

    def checkpoint(self, step: int, model, optimizer, stream: ProblemStream) -> None:
        """Every --save-every steps, except behind the last one: what `resume` needs. Raises RunStopped if the disk is
        full."""
        if not self.args.save_every or step % self.args.save_every or step == self.total_steps:
            return
        state = {"step": step, "position": stream.position, "labels": sorted(self.labels), "spent": self.spent}
        state |= {"run": self.record}
        try:
            checkpoint.save(self.out, model, optimizer, state, self.args.keep_last)
        except OSError as error:
            raise RunStopped(f"--out {self.out}: {error} {checkpoint.going_on(self.out)}") from None

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

    def used(self, max_flops: float | None) -> float:
        """The share of so many FLOPs that is spent; 0 for None."""
        return self.spent["flops"] / max_flops if max_flops else 0.0

    def note(self, **entries) -> None:
        """Add entries to run.json."""
        self.record |= entries
        if parallel.rank() == 0:
            self._write_record()

    def _write_record(self):
        write_aside(self.out / "run.json", json.dumps(self.record, indent=2))

    def log(self, step: int, metrics: dict[str, float], watched: str | None = None) -> None:
        """Append one object to metrics.jsonl. `watched` is the metric to show behind the progress bar."""
        if parallel.rank():
            return
        append(self.out / "metrics.jsonl", json.dumps({"step": step, **metrics}) + "\n")
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if watched:
            shown = f"{watched.split('/')[1]} {metrics.get(watched, float('nan')):.4f}, "
            shown += f"{metrics['charts/response_length']:.0f} tokens, {metrics['charts/tokens_per_sec']:.0f} tok/s"
            self.bar.set_postfix_str(shown, refresh=False)
        if used := self.used(getattr(self.args, "max_flops", None)):
            self.bar.total = min(self.total_steps, max(step, round(step / used)))  # as many as those FLOPs will last for
        self.bar.update(step - self.bar.n)

    def finish(self, model=None, tokenizer=None, dtype=None, **extra) -> None:
        """Save the model (if one is given), then mark run.json finished: the last write of a run. Nothing is left to
        resume, so the checkpoints go."""
        if model is not None:
            save_model(model, tokenizer, self.out, dtype)
        if parallel.rank():
            return
        self.bar.close()
        write_aside(self.out / "labels.json", json.dumps(sorted(self.labels)))
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


def require_same_run(args, inputs: dict[str, str | None], record: dict) -> None:
    """Raise UsageError if the run of `record` (its run.json) was started with another model, other data or another seed, all
    known by what they hold; print whatever else is new."""
    before, now, flags = record["args"], json.loads(json.dumps(asdict(args))), {}
    for name in now:
        flag, held = f"--{name.replace('_', '-')}", (record.get("inputs", {}).get(name), inputs.get(name))
        if None not in held and before.get(name) == now[name]:
            text = f"{flag} {now[name]} holds something else than when the run in {args.out} began: bring that back"
            require(held[0] == held[1], f"--resume: {text}, or choose another --out")
        moved = None not in held and held[0] == held[1]  # the same under another name
        if name not in ("resume", "out") and before.get(name) != now[name] and not moved:
            flags[name] = f"{flag} was {before.get(name)}, now {now[name]}"
    names = FIXED + SAMPLED * any(Path(args.out).glob("rollouts*.jsonl"))
    fixed = [flags[name] for name in names if name in flags]
    require(not fixed, f"--resume: {'; '.join(fixed)}: repeat the flags of {args.out}, or choose another --out")
    problems = record.get("inputs", {}).get("problems", inputs.get("problems"))
    require(
        problems == inputs.get("problems", problems),
        f"--resume: --train-data {getattr(args, 'train_data', '')}: its problems, or what --max-prompt-tokens and columns "
        f"leave of them, are others than when the run in {args.out} began; bring those back, or choose another --out",
    )
    if flags:
        print(f"--resume with changed flags: {'; '.join(flags.values())}")


def keep_metrics(out: Path, last_step: int) -> None:
    """Cut metrics.jsonl behind `last_step`, the step to go on from: later rows are of steps that run again."""
    rows = whole_rows(out / "metrics.jsonl") if last_step else []
    write_aside(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= last_step))


def require_room(args, out: Path, model, dtype) -> None:
    """Raise UsageError if the weights that the last step saves do not fit on the disk; print if the checkpoints may not."""
    final, free = weight_bytes(model, dtype), shutil.disk_usage(out).free
    require(
        final <= free,
        f"--out {out}: has {free / 1e9:.2f} GB free, and the weights at the end need {final / 1e9:.2f} GB: make room, or "
        f"choose another folder",
    )
    copies = (args.keep_last + 1) * bool(args.save_every)  # the new one is whole before the oldest goes
    trained = sum(p.numel() * p.dtype.itemsize for p in model.parameters() if p.requires_grad)
    resumable = 3 * trained * copies  # weights and Adam's two moments
    resumable -= sum(path.stat().st_size for path in out.glob("checkpoints/*/*"))
    if final + resumable > free:
        print(
            f"warning: --out {out}: has {free / 1e9:.2f} GB free; with --keep-last {args.keep_last} the checkpoints and the "
            f"weights at the end need {(final + resumable) / 1e9:.2f} GB more"
        )


class StopRules:
    """Ends a run that goes wrong: the weights are saved, run.json says why and stays unfinished. Every rank must see the
    same values, because all of them save. That they can save, and the last step too, is tried here, before the first."""

    def __init__(self, args, run, model, tokenizer, dtype):
        self.args, self.saved, self.run = args, (model, tokenizer, run.out, dtype), run
        rows = parallel.on_rank_zero(whole_rows, run.out / "metrics.jsonl")  # those of a run that is resumed
        too_many = (row.get("charts/truncated_frac", 0) > args.stop_truncated_frac for row in reversed(rows))
        self.steps_truncated = sum(takewhile(bool, too_many))
        if parallel.rank() == 0:
            require_room(args, run.out, model, dtype)
            try_save(model, tokenizer, run.out, dtype)

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
        """Stop after --stop-patience steps in a row with a truncated_frac above --stop-truncated-frac (0: never). At the
        first step say that the limit is too short for what is sampled, if it is."""
        bound, patience = self.args.stop_truncated_frac, self.args.stop_patience
        if step == 1 and truncated_frac > 0.5 and parallel.rank() == 0:
            print(
                f"warning: {truncated_frac:.0%} of the first step's responses do not end within --max-response-tokens "
                f"{self.args.max_response_tokens}: raise it"
            )
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
    """The command that runs this process, as a user would type it: in the repository, for a script of its own."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent
    name = str(script.relative_to(root)) if script.is_relative_to(root) else sys.argv[0]
    return shlex.join(["python", name, *sys.argv[1:]])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=5)
        return said.stdout.decode().strip() or None
    except (OSError, subprocess.SubprocessError, ValueError):  # none installed, slow, broken: no reason to stop a run
        return None
