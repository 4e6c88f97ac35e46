"""The orchestration, with the stages' commands replaced by fakes that write what the real ones would."""

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro
from conftest import ROOT, read_jsonl, write_jsonl

import bridge
import common
import eval_math
import fkl_warmup
import grpo
import opd
import toy
from common import UsageError

ACCURACY = {"base": 0.1, "teacher_base": 0.3, "teacher_rl": 0.9, "direct_grpo": 0.5, "raw_teacher_warmup": 0.2,
            "raw_teacher": 0.25, "bridge_warmup": 0.6, "bridge": 0.8, "bridge_grpo": 0.85}  # fmt: skip
TRAINED = ["teacher_rl", "direct_grpo", "raw_teacher_warmup", "raw_teacher", "bridge_warmup", "bridge", "bridge_grpo"]


def flag(command, name, count=1):
    at = command.index(name) + 1
    return command[at] if count == 1 else command[at : at + count]


def write_later(path: Path, record: dict):
    """Files of one run must differ in time for the check of what is older than what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    time.sleep(0.01)


class NoPretraining:
    """toy.py's pool: all of toy.py runs but the pretraining."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *args):
        return SimpleNamespace(result=lambda: {"accuracy": 0.3})


@pytest.fixture
def fake(monkeypatch):
    """Replaces subprocess.run; `fake.commands` are the commands run, `fake.fail` the name of a stage that breaks.

    A preflight is not among them: `fake.preflights` holds (its flags, commands before it), `fake.unfit` its exit code."""
    state, real_run = SimpleNamespace(commands=[], fail=None, preflights=[], unfit=0), subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:  # matplotlib looks for fonts when it is first imported on a machine
            return real_run(command, **options)
        assert Path(command[1]).parent == ROOT
        script, flags = Path(command[1]).name, command[2:]
        if "--preflight-only" in flags:
            assert script == "opd.py"
            state.preflights.append((flags, len(state.commands)))
            return SimpleNamespace(returncode=state.unfit)
        state.commands.append([script, *flags])
        out = Path(flag(flags, "--out"))
        if state.fail == out.name:
            write_later(out / "run.json", {"finished": False})
            return SimpleNamespace(returncode=3)
        typed = shlex.join(["python", script, *flags])
        if script == "toy.py":
            monkeypatch.setattr(sys, "argv", command[1:])
            toy.main(tyro.cli(toy.Args, args=flags))
        elif script == "eval_math.py":
            benchmarks = flags[flags.index("--benchmarks") + 1 : flags.index("--out")]
            for spec in benchmarks:
                accuracy = ACCURACY[out.name]
                summary = {"accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "pass_at_k": {"1": accuracy},
                           "response_length": 9.0, "truncated_frac": 0.0, "command": typed}  # fmt: skip
                write_later(out / common.benchmark_name(spec) / "summary.json", summary)
        else:
            labels = {"teacher_rl": 400, "direct_grpo": 410, "bridge_grpo": 100}.get(out.name, 0)
            write_later(out / "run.json", {"finished": True, "labels_used": labels, "command": typed})
            write_jsonl(
                out / "metrics.jsonl", [{"step": s, "charts/reward": 0.1 * s, "losses/reverse_kl": 1.0} for s in (1, 2)]
            )
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(toy, "ProcessPoolExecutor", NoPretraining)
    return state


def stages(fake):
    return [Path(flag(command, "--out")).name for command in fake.commands if command[0] not in ("eval_math.py", "toy.py")]


def evaluated(fake):
    return [Path(flag(command, "--out")).name for command in fake.commands if command[0] == "eval_math.py"]


@pytest.fixture
def problems(tmp_path):
    return write_jsonl(tmp_path / "problems.jsonl", [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(50)])


def real(tmp_path, problems, **changes):
    """Arguments as for real models, on local names."""
    args = {
        "out": str(tmp_path / "run"),
        "teacher": "big",
        "student": "small",
        "train_data": problems,
        "benchmarks": ("b.jsonl",),
    }
    return bridge.Args(**(args | changes))


# --------------------------------------------------------------------------------------------------------------- labels
def test_labels_are_split_80_to_20_without_overlap(tmp_path, problems):
    train, heldout = (read_jsonl(Path(path)) for path in bridge.split_labels(real(tmp_path, problems)))
    assert (len(train), len(heldout)) == (40, 10)
    texts = [[row["prompt"][-1]["content"] for row in part] for part in (train, heldout)]
    assert not set(texts[0]) & set(texts[1]) and len(set(texts[0] + texts[1])) == 50
    assert texts[0] != sorted(texts[0], key=lambda t: int(t.split("+")[0])), "shuffled"
    assert {(t, row["answer"]) for part, t_part in zip((train, heldout), texts, strict=True)
            for row, t in zip(part, t_part, strict=True)} == {(f"{i}+1?", str(i + 1)) for i in range(50)}  # fmt: skip


def test_the_split_is_that_of_seed_42_whatever_the_runs_seed(tmp_path, problems):
    expected = list(range(50))
    random.Random(42).shuffle(expected)
    for seed in (1, 2):
        train, _ = bridge.split_labels(real(tmp_path, problems, out=str(tmp_path / f"run{seed}"), seed=seed))
        assert [row["prompt"][-1]["content"] for row in read_jsonl(Path(train))] == [f"{i}+1?" for i in expected[:40]]


def test_the_split_keeps_chat_prompts_and_the_loader_reads_it_back(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    path = write_jsonl(
        tmp_path / "chat.jsonl", [{"prompt": chat, "answer": "2"}] + [{"prompt": f"{i}?", "answer": "1"} for i in range(4)]
    )
    parts = [common.load_problems(part, "--train-data", True) for part in bridge.split_labels(real(tmp_path, path))]
    assert sorted(parts[0] + parts[1], key=str) == sorted(common.load_problems(path, "--train-data", True), key=str)


def test_other_training_data_in_the_same_folder_is_refused(tmp_path, fake, problems):
    """Otherwise the old split would be used without a word."""
    bridge.main(real(tmp_path, problems))
    other = write_jsonl(tmp_path / "other.jsonl", [{"problem": f"{i}-1?", "answer": str(i - 1)} for i in range(50)])
    with pytest.raises(UsageError, match="--train-data"):
        bridge.main(real(tmp_path, other))


# --------------------------------------------------------------------------------------------------------------- stages
def test_stages_run_in_order_with_the_right_models_and_data(tmp_path, fake, problems):
    args = real(tmp_path, problems, opd_flags="--learning-rate 1e-5", stage3_flags="--max-steps 7")
    bridge.main(args)
    out = args.out
    by_stage = {Path(flag(c, "--out")).name: c for c in fake.commands if c[0] != "eval_math.py"}
    assert stages(fake) == TRAINED
    models = {"teacher_rl": ("grpo.py", ["big"]), "direct_grpo": ("grpo.py", ["small"]),
              "raw_teacher_warmup": ("fkl_warmup.py", ["big", "small"]),
              "raw_teacher": ("opd.py", ["big", f"{out}/raw_teacher_warmup"]),
              "bridge_warmup": ("fkl_warmup.py", [f"{out}/teacher_rl", "small"]),
              "bridge": ("opd.py", [f"{out}/teacher_rl", f"{out}/bridge_warmup"]),
              "bridge_grpo": ("grpo.py", [f"{out}/bridge"])}  # fmt: skip
    for name, (script, paths) in models.items():
        command = by_stage[name]
        assert command[0] == script
        flags = ["--model"] if script == "grpo.py" else ["--teacher", "--student"]
        assert [flag(command, f) for f in flags] == paths
        assert flag(command, "--train-data") == f"{out}/data/{'heldout' if name == 'bridge_grpo' else 'train'}.jsonl"
        assert ("--learning-rate" in command) == (script == "opd.py") and ("--max-steps" in command) == (
            name == "bridge_grpo"
        )
    assert set(evaluated(fake)) == {"base", "teacher_base", *TRAINED}


def test_every_command_is_printed_as_a_user_would_type_it(tmp_path, fake, problems, capsys):
    bridge.main(real(tmp_path, problems))
    out = capsys.readouterr().out
    for script, *flags in fake.commands:
        assert f"$ {shlex.join(['python', script, *flags])}\n" in out


def test_some_arms_need_some_stages_only(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems, arms=("base", "raw_teacher")))
    assert stages(fake) == ["raw_teacher_warmup", "raw_teacher"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["arms"]) == ["base", "raw_teacher"]


def test_what_is_finished_is_skipped(tmp_path, fake, problems, capsys):
    bridge.main(real(tmp_path, problems))
    first = (tmp_path / "run" / "report.json").read_text()
    done, fake.commands = len(fake.commands), []
    capsys.readouterr()
    bridge.main(real(tmp_path, problems))
    assert fake.commands == [] and capsys.readouterr().out.count("# finished before: ") == done
    assert (tmp_path / "run" / "report.json").read_text() == first


def test_a_broken_stage_ends_the_run_and_is_continued(tmp_path, fake, problems, capsys):
    fake.fail = "bridge_warmup"
    with pytest.raises(SystemExit) as stop:
        bridge.main(real(tmp_path, problems))
    assert stop.value.code == 3 and "fkl_warmup.py ended with exit code 3" in capsys.readouterr().err
    assert stages(fake)[-1] == "bridge_warmup" and evaluated(fake) == []
    fake.fail, fake.commands = None, []
    bridge.main(real(tmp_path, problems))
    assert stages(fake) == ["bridge_warmup", "bridge", "bridge_grpo"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    fake.commands = []
    for changes in ({"seed": 2}, {"teacher": "bigger"}, {"opd_flags": "--max-steps 3"}, {"eval_flags": "--samples 2"}):
        with pytest.raises(UsageError, match="delete it,? or choose another --out"):
            bridge.main(real(tmp_path, problems, **changes))
    assert fake.commands == []


def test_a_stage_older_than_what_it_was_made_from_is_refused(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    (tmp_path / "run" / "bridge_warmup" / "run.json").unlink()
    with pytest.raises(UsageError, match="run/bridge: older than .*it was made from"):
        bridge.main(real(tmp_path, problems))
    assert stages(fake)[-1] == "bridge_warmup"


@pytest.mark.parametrize("changes, message", [
    ({"arms": ("bridge", "nonsense")}, "--arms bridge nonsense: choose all, or some of base"),
    ({"student": None}, "--teacher and --student go together"),
    ({"teacher": None}, "--teacher and --student go together"),
])  # fmt: skip
def test_bad_flags_are_refused(tmp_path, fake, problems, changes, message):
    with pytest.raises(UsageError, match=message):
        bridge.main(real(tmp_path, problems, **changes))
    assert fake.commands == []


# -------------------------------------------------------------------------------------------------------- embedded world
def test_without_models_the_embedded_world_is_built_and_used(tmp_path, fake):
    out = str(tmp_path / "demo")
    bridge.main(bridge.Args(out=out, opd_flags="--max-steps 2", toy_flags="--arch llama"))
    toy_command, *rest = fake.commands
    assert toy_command == ["toy.py", "--out", f"{out}/world", "--seed", "1", "--arch", "llama"]
    assert stages(fake) == TRAINED
    for command in rest:
        name = Path(flag(command, "--out")).name
        if command[0] == "eval_math.py":
            assert flag(command, "--benchmarks") == f"{out}/world/test.jsonl"
        else:
            assert flag(command, "--train-data") == f"{out}/world/{'heldout' if name == 'bridge_grpo' else 'train'}.jsonl"
            assert flag(command, "--eval-data") == f"{out}/world/dev.jsonl", (
                "nothing but eval_math.py sees the test problems"
            )
        if command[0] == "opd.py":
            assert command[-2:] == ["--max-steps", "2"], "the command line has the last word"


def test_another_embedded_world_in_the_same_folder_is_refused(tmp_path, fake):
    bridge.main(bridge.Args(out=str(tmp_path / "demo")))
    with pytest.raises(UsageError, match="world: .*choose another --out"):
        bridge.main(bridge.Args(out=str(tmp_path / "demo"), toy_flags="--arch llama"))


def test_the_embedded_settings_are_flags_that_the_scripts_know(tmp_path, fake):
    """The fakes take anything; the scripts' own parsers do not."""
    bridge.main(bridge.Args(out=str(tmp_path / "demo")))
    parsers = {"grpo.py": grpo, "opd.py": opd, "fkl_warmup.py": fkl_warmup, "eval_math.py": eval_math, "toy.py": toy}
    assert {command[0] for command in fake.commands} == set(parsers)
    for script, *flags in fake.commands:
        tyro.cli(parsers[script].Args, args=flags)


# ---------------------------------------------------------------------------------------------------------------- report
def test_report_json_holds_every_arm_and_stage(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems, benchmarks=("b.jsonl", "org/set:c:test")))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report) >= {"benchmark", "arms", "stages", "seed"} and report["benchmark"] == "b"
    assert list(report["arms"]) == ["base", "direct_grpo", "raw_teacher", "bridge", "bridge_grpo"]
    labels = {"base": 0, "direct_grpo": 410, "raw_teacher": 0, "bridge": 400, "bridge_grpo": 500}  # those of its stages
    for arm, row in report["arms"].items():
        assert row["accuracy"] == ACCURACY[arm] and row["labels_used"] == labels[arm]
        assert row["ci95"] == [ACCURACY[arm] - 0.05, ACCURACY[arm] + 0.05]
        assert set(row["benchmarks"]) == {"b", "org_set_c_test"} and row["benchmarks"]["b"]["accuracy"] == ACCURACY[arm]
    assert set(report["stages"]) == set(ACCURACY)
    assert report["stages"]["bridge"]["labels_used"] == 0 and report["stages"]["teacher_rl"]["labels_used"] == 400


def test_report_md_is_a_table_with_the_plot(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| bridge | 0.800 | 0.750 to 0.850 | 400 |" in text and "| bridge_grpo | 0.850 | 0.800 to 0.900 | 500 |" in text
    assert "(report.png)" in text
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot_but_a_report(tmp_path, fake, problems, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bridge.main(real(tmp_path, problems))
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.json").exists() and not (tmp_path / "run" / "report.png").exists()


# ------------------------------------------------------------------------------------------------------------ preflight
def test_teacher_and_student_are_compared_before_the_first_stage(fake, tmp_path, problems):
    bridge.main(real(tmp_path, problems, opd_flags="--thinking --teacher-thinking", seed=7))
    [(flags, before)] = fake.preflights
    assert before == 0 and (flag(flags, "--teacher"), flag(flags, "--student")) == ("big", "small")
    assert "--thinking" in flags and flag(flags, "--seed") == "7" and "--force" not in flags
    assert tyro.cli(opd.Args, args=flags).preflight_only
    bridge.main(real(tmp_path, problems, opd_flags="--thinking --teacher-thinking", seed=7))
    assert len(fake.preflights) == 1, "with a stage finished, it has passed before"


def test_a_pair_that_does_not_fit_costs_no_stage(fake, tmp_path, problems):
    fake.unfit = 2
    with pytest.raises(SystemExit) as stop:
        bridge.main(real(tmp_path, problems))
    assert stop.value.code == 2 and fake.commands == []


def test_the_embedded_world_is_built_before_its_preflight(fake, tmp_path):
    bridge.main(bridge.Args(out=str(tmp_path / "run"), arms=("bridge",)))
    [(flags, before)] = fake.preflights
    assert before == 1 and fake.commands[0][0] == "toy.py" and flag(flags, "--instruction") == ""


def test_arms_without_a_teacher_need_no_preflight(fake, tmp_path, problems):
    bridge.main(real(tmp_path, problems, arms=("base", "direct_grpo")))
    assert fake.preflights == []


def test_force_reaches_the_preflight_and_every_stage_that_has_one(fake, tmp_path, problems):
    bridge.main(real(tmp_path, problems, force=True))
    assert "--force" in fake.preflights[0][0]
    assert all(("--force" in c) == (c[0] in ("opd.py", "fkl_warmup.py")) for c in fake.commands)
