"""The command line: which group of --help a flag stands in, and what a typed flag becomes."""

import re
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPTS

import common
from infra import cli as command_line

TRAINERS = ["grpo", "fkl_warmup", "opd"]
OWN_OPTIONS = {"vllm_gpu_memory_utilization", "vllm_sleep"}  # shared flags of which fkl_warmup.py has its own default


def groups_of(text: str) -> dict[str, dict[str, str]]:
    """{title of a box of --help: {flag: all that stands behind it}}, from a terminal too narrow for two columns."""
    groups, flags, flag = {}, None, None
    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            flags = groups.setdefault(title[1].removesuffix(" options"), {})
            flag = None
        elif flags is not None and line.startswith("│"):
            words = line.strip("│ ")
            if named := re.match(r"--([a-z0-9-]+)", words):
                flag = named[1].replace("-", "_")
                flags[flag] = ""
            if flag:
                flags[flag] += " " + words
    return {title: {name: " ".join(text.split()) for name, text in flags.items()} for title, flags in groups.items()}


@pytest.fixture
def help_of(cli, monkeypatch):
    def read(script):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = cli(script, "--help")
        assert code == 0
        return groups_of(re.sub(r"\x1b\[[0-9;]*m", "", out))

    return read


@pytest.mark.parametrize("script", TRAINERS)
def test_help_shows_the_algorithm_apart_from_the_run_and_the_rollout(help_of, script):
    """Every flag once, flat, in the group of the class that has it first."""
    groups = help_of(script)
    assert {"algorithm", "run", "rollout"} <= groups.keys()
    shared = {name: {f.name for f in fields(c)} for name, c in (("run", common.RunArgs), ("rollout", common.RolloutArgs))}
    every = {f.name for f in fields(SCRIPTS[script].Args)}
    assert groups["run"].keys() == shared["run"] and groups["rollout"].keys() == shared["rollout"]
    assert groups["algorithm"].keys() == every - shared["run"] - shared["rollout"]
    assert {"learning_rate", "max_steps", "epochs"} <= groups["algorithm"].keys()
    shown = [name for flags in groups.values() for name in flags]
    assert len(shown) == len(set(shown)) and not any("." in name for name in shown)


@pytest.mark.parametrize("script", TRAINERS)
def test_every_flag_has_a_text(help_of, script):
    for flags in help_of(script).values():
        for name, text in flags.items():
            assert re.search(r"[a-z]{3}.*\((default:|required)", text.split(" ", 1)[1]), (name, text)


def test_a_scripts_own_default_of_a_shared_flag_stands_in_the_shared_group(help_of):
    warmup, others = help_of("fkl_warmup"), [help_of("grpo"), help_of("opd")]
    assert not OWN_OPTIONS & warmup["algorithm"].keys()
    assert "rollouts.jsonl, metrics.jsonl" in warmup["run"]["out"] and "(default: ckpt/warmup)" in warmup["run"]["out"]
    for groups, default in zip(others, ("ckpt/grpo", "ckpt/opd"), strict=True):
        assert "rollouts.jsonl" not in groups["run"]["out"] and f"(default: {default})" in groups["run"]["out"]
    defaults = [(groups["run"]["out"].split()[-1]) for groups in (warmup, *others)]
    assert defaults == ["ckpt/warmup)", "ckpt/grpo)", "ckpt/opd)"]


@pytest.mark.parametrize("script", TRAINERS)
def test_flags_reach_the_arguments_whatever_their_group(monkeypatch, script):
    models = {"grpo": ["--model", "m"]}.get(script, ["--teacher", "t", "--student", "s"])
    words = [*models, "--out", "o", "--learning-rate", "0.5", "--no-vllm-sleep", "--instruction", "", "--resume"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *words])
    module = SCRIPTS[script]
    args = command_line.parse(module.Args, module.__doc__)
    named = {"model": "m"} if script == "grpo" else {"teacher": "t", "student": "s"}
    changed = {"out": "o", "learning_rate": 0.5, "vllm_sleep": False, "instruction": "", "resume": True}
    assert args == module.Args(**named, **changed)
