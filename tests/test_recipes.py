"""recipes/: every command parses, names only files that an earlier one writes, and fits the hardware of recipes/README.md.

The scripts are run by bash itself, with a `python` and a `torchrun` that write down their arguments."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import test_docs
import tyro
from conftest import ROOT, SCRIPTS
from test_plan import CONFIGS

from infra import dataset, plan

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*.sh"))
ARMS = {"direct_grpo", "raw_teacher", "bridge", "no_warmup", "no_opd", "bridge_grpo"}
RECORD = """#!/bin/sh
for word in "$(basename "$0")" "$@"; do printf '%s\\037' "$word" >> "$COMMANDS"; done
echo >> "$COMMANDS"
"""


def read(recipe: str) -> str:
    return (ROOT / "recipes" / f"{recipe}.sh").read_text()


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def commands(recipe, tmp_path_factory):
    """The words of every command, as the recipe starts them into the folder `runs`."""
    folder = tmp_path_factory.mktemp("path")
    for name in ("python", "torchrun"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "COMMANDS": str(folder / "commands"), "NODE_RANK": "0", "HEAD": "node0"}
    script = ROOT / "recipes" / f"{recipe}.sh"
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["bash", script, "runs"], check=True, env=env, timeout=60)
    lines = (folder / "commands").read_text().splitlines()
    return [line.split("\037")[:-1] for line in lines]


def scripts(commands):
    """(script, its Args, words before it) of every command that runs one of the scripts."""
    for words in commands:
        if "-c" not in words:
            at = next(k for k, word in enumerate(words) if word.endswith(".py"))
            name = words[at].removesuffix(".py")
            yield name, tyro.cli(SCRIPTS[name].Args, args=words[at + 1 :]), words[:at]


def test_every_command_parses_and_every_arm_is_made_and_measured(commands):
    parsed = list(scripts(commands))
    outs = [args.out for _, args, _ in parsed if args.out]
    assert len(outs) == len(set(outs))
    for arm in ARMS | {"teacher_rl"}:
        assert f"runs/{arm}" in outs and f"runs/eval/{arm}" in outs
    compared = {folder for _, args, _ in parsed for folder in getattr(args, "compare", None) or ()}
    assert compared == {f"runs/eval/{arm}" for arm in ARMS}


def test_every_file_is_the_output_of_an_earlier_command(commands, monkeypatch, tmp_path):
    problems = [dataset.Problem(f"{i}+1?", (), str(i + 1)) for i in range(10)]
    monkeypatch.setattr(dataset, "load_problems", lambda *args, **flags: list(problems))
    monkeypatch.chdir(tmp_path)
    assert commands[0][:2] == ["python", "-c"]
    exec(commands[0][2], {})  # the split of the labels, by the driver's own function
    made = {str(path) for path in Path("runs/data").iterdir()}
    assert made == {"runs/data/train.jsonl", "runs/data/heldout.jsonl"}
    for script, args, _ in scripts(commands):
        named = [getattr(args, name, None) for name in ("model", "teacher", "student")]
        named += [*(getattr(args, "compare", None) or ()), *([] if script == "eval_math" else [args.train_data])]
        missing = {name for name in named if name} - made - set(CONFIGS)
        assert not missing, f"{script}.py --out {args.out}: nothing before it writes {missing}"
        made.add(args.out)


def test_labels_are_spent_once(commands):
    data = {args.out: args.train_data for script, args, _ in scripts(commands) if script != "eval_math"}
    assert {out for out, path in data.items() if path == "runs/data/heldout.jsonl"} == {"runs/bridge_grpo"}


def documented(recipe: str) -> list[str]:
    """The row of recipes/README.md: recipe, hardware, the largest plan, what was run."""
    page = (ROOT / "recipes" / "README.md").read_text()
    [row] = re.findall(rf"^\| `{re.escape(recipe)}\.sh` \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def activation_bytes(args, sizes, *shape, count=plan.activation_bytes, known={}):  # noqa: B006  (most stages share one)
    key = (sizes.params, args.gradient_checkpointing, args.lora_rank, *shape)
    return known[key] if key in known else known.setdefault(key, count(args, sizes, *shape))


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """`planned(script, args, launcher, gigabytes)` runs a script up to its own check of the plan, which refuses what a user
    would be refused: (GPUs, GB that each needs). It does so in a folder with the configs of the hub ids."""
    check, peaks = plan.check, []

    def check_and_stop(args, work):
        check(args, work)
        peaks.append(plan.peak_bytes(plan.estimate(args, work, plan.Hardware.find(args))) / plan.GB)
        raise InterruptedError

    monkeypatch.setattr(plan, "check", check_and_stop)
    monkeypatch.setattr(plan, "activation_bytes", activation_bytes)
    monkeypatch.chdir(tmp_path)
    for name, config in CONFIGS.items():
        config.save_pretrained(name)

    def run(script, args, launcher, gigabytes):
        gpus = int(after(launcher, "--nproc_per_node")) * int(after(launcher, "--nnodes"))
        with pytest.raises(InterruptedError):
            SCRIPTS[script].main(replace(args, plan_gpu=f"{gpus}x{gigabytes}GB"))
        return gpus, peaks[-1]

    return run


@pytest.mark.slow
def test_every_stage_fits_the_hardware_beside_it(recipe, commands, planned):
    """With configs written out for what each command leaves."""
    hardware, expected, *_ = documented(recipe)
    gpus, memory = map(int, re.match(r"(\d+) × (\d+) GB", hardware).groups())
    models, peaks = dict(CONFIGS), {}
    for script, args, launcher in scripts(commands):
        if script != "eval_math":
            models[args.out] = models[args.model if script == "grpo" else args.student]
            models[args.out].save_pretrained(args.out)
            used, peaks[args.out] = planned(script, args, launcher, memory)
            assert used == gpus
    largest = max(peaks, key=peaks.get)
    assert peaks[largest] <= memory
    assert expected == f"{peaks[largest]:.1f} GB in `{Path(largest).name}`", peaks


@pytest.mark.slow
def test_every_command_of_the_pages_fits_gpus_of_80_gb(planned):
    """As many as its torchrun names, one without: what a reader types first is refused by no plan."""
    models = CONFIGS | {"ckpt/8b_rl": CONFIGS["Qwen/Qwen3-8B"]}
    models |= {f"ckpt/{name}": CONFIGS["Qwen/Qwen3-1.7B"] for name in ("warmup", "bridge", "opd")}
    for name, config in models.items():
        config.save_pretrained(name)
    seen = set()
    for page in [*test_docs.PAGES, "grpo.py", "fkl_warmup.py", "opd.py"]:
        for launcher, (file, *words) in test_docs.launched(page):
            script = file.removesuffix(".py")
            if script in ("grpo", "fkl_warmup", "opd") and set(words) & set(models) and "--plan" not in words:
                planned(script, tyro.cli(SCRIPTS[script].Args, args=words), launcher, 80)
                seen.add(page)
    assert {"README.md", "docs/scaling.md", "docs/lora.md", "grpo.py", "fkl_warmup.py", "opd.py"} <= seen


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1] if flag in words else "1"


def test_a_page_says_what_was_run():
    assert {documented(recipe)[-1] for recipe in RECIPES} == {"not run"}
