"""The orchestration, with the stages' commands replaced by fakes that write what the real ones would."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT, SCRIPTS, read_jsonl, write_jsonl

import bridge
import eval_math
import fkl_warmup
import grpo
import opd
import toy
from infra import dataset, report, stages, worlds
from infra.bootstrap import bootstrap_ci95, drawn_means, verdict
from infra.cli import UsageError
from infra.digest import digest_of

ACCURACY = {"base": 0.1, "teacher_base": 0.3, "teacher_rl": 0.9, "direct_grpo": 0.5, "raw_teacher_warmup": 0.2,
            "raw_teacher": 0.25, "bridge_warmup": 0.6, "bridge": 0.8, "bridge_grpo": 0.85, "cold_grpo": 0.4,
            "no_warmup": 0.7, "no_opd": 0.65, "sft": 0.6, "long_grpo": 0.7, "replay": 0.8, "reward_free": 0.05,
            "own_prompts_warmup": 0.5, "bridge_own_prompts": 0.75}  # fmt: skip
TRAINED = ["teacher_rl", "direct_grpo", "raw_teacher_warmup", "bridge_warmup", "raw_teacher", "bridge", "bridge_grpo"]
CONTROLS = ["cold_grpo", "no_warmup", "no_opd", "sft", "long_grpo", "replay", "reward_free"]
UPDATES = {"teacher_rl": 8, "bridge_warmup": 3, "bridge": 7, "bridge_grpo": 5}
PROBLEMS = 100  # of every benchmark; problem i is right after a stage when i < 100 times its accuracy


def flag(command, name, count=1):
    at = command.index(name) + 1
    return command[at] if count == 1 else command[at : at + count]


def write(path: Path, record: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def inputs_of(typed: str, spec: str | None = None):
    """What a script records of its inputs; `spec`: the benchmark of this summary.json."""
    names = ("model", "teacher", "student", "train_data", "label_split", "eval_data")
    found = {name: digest_of(specs[0]) for name in names if (specs := stages.values_of(typed, name))}
    return found | ({"benchmark": digest_of(spec)} if spec else {})


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

    A preflight is not among them: `fake.preflights` holds (its flags, commands before it), `fake.unfit` its exit code.
    `fake.ranks` are the numbers of processes that any of them had."""
    state, real_run = SimpleNamespace(commands=[], fail=None, preflights=[], unfit=0, ranks=set()), subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:  # matplotlib looks for fonts when it is first imported on a machine
            return real_run(command, **options)
        ranks = command[1:5] if command[1] == "-m" else []  # -m torch.distributed.run --standalone --nproc_per_node=N
        state.ranks.add(int(ranks[3].split("=")[1]) if ranks else 1)
        script, flags = str(Path(command[len(ranks) + 1]).relative_to(ROOT)), command[len(ranks) + 2 :]
        if "--preflight-only" in flags:
            assert script == "opd.py"
            state.preflights.append((flags, len(state.commands)))
            return SimpleNamespace(returncode=state.unfit)
        state.commands.append([script, *flags])
        out = Path(flag(flags, "--out"))
        if state.fail == out.name:
            out.mkdir(parents=True, exist_ok=True)
            write(out / "run.json", {"finished": False})
            return SimpleNamespace(returncode=3)
        typed = shlex.join(["python", script, *flags])
        if script == "toy.py":
            monkeypatch.setattr(sys, "argv", command[1:])
            toy.main(tyro.cli(toy.Args, args=flags))
        elif script == "eval_math.py":
            benchmarks = flags[flags.index("--benchmarks") + 1 : flags.index("--out")]
            for spec in benchmarks:
                folder, right = out / dataset.benchmark_name(spec), round(PROBLEMS * ACCURACY[out.name])
                folder.mkdir(parents=True)
                write_jsonl(
                    folder / "generations.jsonl", [{"problem": f"{i}", "reward": float(i < right)} for i in range(100)]
                )
                write(folder / "summary.json", {"command": typed, "inputs": inputs_of(typed, spec)})
        else:
            name, data = out.name, flag(flags, "--train-data")
            labels = [p.text for p in dataset.load_problems(data, "--train-data", True)] if script == "grpo.py" else []
            out.mkdir(parents=True, exist_ok=True)
            args = {"group_size": 8} if script == "grpo.py" else {"rollouts_per_prompt": 4} if "warmup" in script else {}
            write_jsonl(
                out / "metrics.jsonl", [{"step": s, "charts/reward": 0.1 * s, "losses/reverse_kl": 1.0} for s in (1, 2)]
            )
            write(out / "labels.json", labels)
            spent = {"updates": UPDATES.get(name, 10), "sampled_tokens": 1000, "flops": 1e15}
            (out / "config.json").write_text(str(len(state.commands)))  # of weights that no other run has
            record = {"finished": True, "args": args, "command": typed, "inputs": inputs_of(typed)}
            write(out / "run.json", record | spent)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(toy, "ProcessPoolExecutor", NoPretraining)
    return state


def stages_run(fake):
    return [Path(flag(command, "--out")).name for command in fake.commands if command[0] not in ("eval_math.py", "toy.py")]


def evaluated(fake):
    return [Path(flag(command, "--out")).name for command in fake.commands if command[0] == "eval_math.py"]


@pytest.fixture
def problems(tmp_path):
    return write_jsonl(tmp_path / "problems.jsonl", [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(50)])


def real(tmp_path, problems, **changes):
    """Arguments as for real models, on local names."""
    benchmark = tmp_path / "b.jsonl"
    if not benchmark.exists():
        write_jsonl(benchmark, [{"problem": "1*2?", "answer": "2"}])
    args = {
        "out": str(tmp_path / "run"),
        "teacher": "big",
        "student": "small",
        "train_data": problems,
        "benchmarks": (str(benchmark),),
        "warmup_flags": "--rollouts-per-step 8",
    }
    return bridge.Args(**(args | changes))


def split(tmp_path, problems):
    return dataset.split_labels(problems, "--train-data", tmp_path / "run/data")


# --------------------------------------------------------------------------------------------------------------- labels
def test_labels_are_split_80_to_20_without_overlap(tmp_path, problems):
    train, heldout = (read_jsonl(Path(path)) for path in split(tmp_path, problems))
    assert (len(train), len(heldout)) == (40, 10)
    texts = [[row["prompt"][-1]["content"] for row in part] for part in (train, heldout)]
    assert not set(texts[0]) & set(texts[1]) and len(set(texts[0] + texts[1])) == 50
    assert texts[0] != sorted(texts[0], key=lambda t: int(t.split("+")[0])), "shuffled"
    assert {(t, row["answer"]) for part, t_part in zip((train, heldout), texts, strict=True)
            for row, t in zip(part, t_part, strict=True)} == {(f"{i}+1?", str(i + 1)) for i in range(50)}  # fmt: skip


def test_the_split_is_that_of_seed_42_whatever_the_runs_seed(tmp_path, fake, problems):
    expected = list(range(50))
    random.Random(42).shuffle(expected)
    for seed in (1, 2):
        bridge.main(real(tmp_path, problems, out=str(tmp_path / f"run{seed}"), seed=seed, arms=("base",)))
        train = tmp_path / f"run{seed}/data/train.jsonl"
        assert [row["prompt"][-1]["content"] for row in read_jsonl(Path(train))] == [f"{i}+1?" for i in expected[:40]]


def test_the_split_keeps_chat_prompts_and_the_loader_reads_it_back(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    path = write_jsonl(
        tmp_path / "chat.jsonl", [{"prompt": chat, "answer": "2"}] + [{"prompt": f"{i}?", "answer": "1"} for i in range(4)]
    )
    parts = [dataset.load_problems(part, "--train-data", True) for part in split(tmp_path, path)]
    assert sorted(parts[0] + parts[1], key=str) == sorted(dataset.load_problems(path, "--train-data", True), key=str)


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
    assert stages_run(fake) == TRAINED
    models = {"teacher_rl": ("grpo.py", ["big"]), "direct_grpo": ("grpo.py", ["small"]),
              "raw_teacher_warmup": ("fkl_warmup.py", ["big", "small"]),
              "raw_teacher": ("opd.py", ["big", f"{out}/seed1/raw_teacher_warmup"]),
              "bridge_warmup": ("fkl_warmup.py", [f"{out}/seed1/teacher_rl", "small"]),
              "bridge": ("opd.py", [f"{out}/seed1/teacher_rl", f"{out}/seed1/bridge_warmup"]),
              "bridge_grpo": ("grpo.py", [f"{out}/seed1/bridge"])}  # fmt: skip
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
    assert stages_run(fake) == ["raw_teacher_warmup", "raw_teacher"]
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
    assert stages_run(fake)[-1] == "bridge_warmup" and evaluated(fake) == []
    fake.fail, fake.commands = None, []
    bridge.main(real(tmp_path, problems))
    assert stages_run(fake) == ["bridge_warmup", "raw_teacher", "bridge", "bridge_grpo"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    fake.commands = []
    for changes in ({"teacher": "bigger"}, {"opd_flags": "--max-steps 3"}, {"eval_flags": "--samples 2"}):
        with pytest.raises(UsageError, match="delete it,? or choose another --out"):
            bridge.main(real(tmp_path, problems, **changes))
    assert fake.commands == []


def test_a_stage_whose_input_was_trained_again_is_refused(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    (tmp_path / "run" / "seed1" / "bridge_warmup" / "run.json").unlink()
    held = "run/seed1/bridge: was made when --student .*bridge_warmup held something else; delete it to make it again"
    with pytest.raises(UsageError, match=held):
        bridge.main(real(tmp_path, problems))
    assert stages_run(fake)[-1] == "bridge_warmup"


@pytest.mark.parametrize("name, flag", [("teacher", "--teacher|--model"), ("benchmark", "--benchmark"), ("world", "--")])
def test_an_input_of_the_whole_bridge_that_was_replaced_is_refused(tmp_path, fake, problems, name, flag):
    teacher, benchmark = tmp_path / "big", tmp_path / "b.jsonl"
    write(teacher / "config.json", {"size": 8})
    write_jsonl(benchmark, [{"problem": "1+1?", "answer": "2"}])
    args = {"teacher": str(teacher), "benchmarks": (str(benchmark),)}
    if name == "world":
        args = {"out": str(tmp_path / "run")}
    again = bridge.Args(**args) if name == "world" else real(tmp_path, problems, **args)
    bridge.main(again)
    replaced = {"teacher": teacher / "config.json", "benchmark": benchmark, "world": tmp_path / "run/world/test.jsonl"}[name]
    replaced.write_text(replaced.read_text() + "\n")
    count = len(fake.commands)
    with pytest.raises(UsageError, match=f"was made when ({flag}).* held something else; delete it to make it again"):
        bridge.main(bridge.Args(**args) if name == "world" else real(tmp_path, problems, **args))
    assert len(fake.commands) == count


@pytest.mark.parametrize("where", ["run", "elsewhere/of another name"])
def test_a_finished_folder_that_was_copied_is_accepted(tmp_path, fake, problems, where):
    """cp -r gives every file a new time, in any order, and the folder perhaps another name."""
    first = real(tmp_path, problems, arms=("bridge", "base"))
    bridge.main(first)
    commands = len(fake.commands)
    shutil.move(tmp_path / "run", tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / where, copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "kept")
    bridge.main(real(tmp_path, problems, arms=("bridge", "base"), out=str(tmp_path / where)))
    assert len(fake.commands) == commands
    with pytest.raises(UsageError, match="holds `python"):
        bridge.main(real(tmp_path, problems, arms=("bridge", "base"), out=str(tmp_path / where), opd_flags="--max-steps 9"))


@pytest.mark.parametrize("changes, message", [
    ({"arms": ("bridge", "nonsense")}, "--arms bridge nonsense: choose all, or some of base"),
    ({"student": None}, "--teacher and --student go together"),
    ({"teacher": None}, "--teacher and --student go together"),
    ({"world": "swaps"}, "--world and --toy-flags are for the embedded worlds"),
    ({"toy_flags": "--arch llama"}, "--world and --toy-flags are for the embedded worlds"),
    ({"stage3_flags": "--max-stepz 4"}, "--stage3-flags '--max-stepz 4': not flags of grpo.py"),
    ({"eval_flags": "--samples many"}, "--eval-flags .*: not flags of eval_math.py"),
    ({"warmup_flags": "--rollouts-per-step 64"}, "train.jsonl: 40 rollouts for the warmup, and a step takes 64"),
    ({"labels": (4, 16)}, "labels4.jsonl: 4 rollouts for the warmup, and a step takes 8"),
    ({"labels": (8, 16), "arms": ("cold_grpo",)}, "--labels: cold_grpo use held-out labels besides"),
    ({"arms": ("reward_free",), "opd_flags": "--jsd-beta 0.5"}, "'--jsd-beta 0.5': not flags of variants/opd_sampled.py"),
    ({"benchmarks": ("math500", "elsewhere/math500.jsonl")}, "math500 math500 would share a result folder"),
    ({"pilot_samples": 7}, "--pilot-samples 7: give 8"),
])  # fmt: skip
def test_bad_flags_are_refused(tmp_path, fake, problems, changes, message):
    with pytest.raises(UsageError, match=message):
        bridge.main(real(tmp_path, problems, **changes))
    assert fake.commands == []


def test_flags_for_every_stage_stand_before_its_own(tmp_path, fake, problems):
    flags = {"train_flags": "--gradient-checkpointing --save-every 7", "opd_flags": "--save-every 9"}
    bridge.main(real(tmp_path, problems, arms=("all",), **flags))
    for command in commands_of(fake).values():
        args, has_opd_flags = parse(command), command[0] in ("opd.py", "variants/opd_sampled.py")
        assert args.gradient_checkpointing and args.save_every == (9 if has_opd_flags else 7)


def test_under_torchrun_the_driver_refuses(tmp_path, fake, problems, monkeypatch):
    monkeypatch.setattr(bridge.parallel, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="--nproc: bridge.py starts the ranks itself"):
        bridge.main(real(tmp_path, problems))
    assert fake.commands == []


@pytest.mark.parametrize("first", [True, False])
def test_force_may_be_given_later_or_not_any_more(tmp_path, fake, problems, first):
    """It is asked for when the second of two dense stages finds an error."""
    bridge.main(real(tmp_path, problems, force=first))
    fake.commands.clear()
    bridge.main(real(tmp_path, problems, force=not first))
    assert fake.commands == []


# -------------------------------------------------------------------------------------------------------- embedded world
def test_without_models_the_embedded_world_is_built_and_used(tmp_path, fake):
    out = str(tmp_path / "demo")
    bridge.main(bridge.Args(out=out, opd_flags="--max-steps 2", toy_flags="--arch llama", jobs=1))
    toy_command, *rest = fake.commands
    world = ["--world", "arithmetic", "--out", f"{out}/world", "--seed", "1", "--arch", "llama"]
    assert toy_command == ["toy.py", *world]
    assert stages_run(fake) == TRAINED
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
            assert tyro.cli(opd.Args, args=command[1:]).max_steps == 2, "the command line has the last word"


@pytest.mark.parametrize("slash", ["{}/", "{}/."])
def test_a_folder_is_the_same_however_it_is_typed(tmp_path, fake, slash):
    out = str(tmp_path / "demo")
    bridge.main(bridge.Args(out=slash.format(out), arms=("bridge",)))
    fake.commands.clear()
    bridge.main(bridge.Args(out=out, arms=("bridge",)))
    assert fake.commands == []


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


# --------------------------------------------------------------------------------------------------------------- controls
def parse(command):
    """A stage's command as the script itself would read it."""
    return tyro.cli(SCRIPTS[command[0].removesuffix(".py")].Args, args=command[1:])


def commands_of(fake):
    return {Path(flag(c, "--out")).name: c for c in fake.commands if c[0] not in ("eval_math.py", "toy.py")}


def test_controls_make_as_many_updates_as_what_they_are_held_against(tmp_path, fake, problems):
    warmup = "--max-steps 98 --rollouts-per-step 8"
    bridge.main(real(tmp_path, problems, arms=("all",), opd_flags="--max-steps 99", warmup_flags=warmup))
    assert stages_run(fake) == TRAINED + CONTROLS
    made, out = commands_of(fake), f"{tmp_path}/run/seed1"
    parsed = {name: parse(c) for name, c in made.items()}
    for name in ("no_warmup", "no_opd", "sft", "reward_free"):
        assert parsed[name].max_steps == UPDATES["bridge_warmup"] + UPDATES["bridge"] and parsed[name].student == "small"
    assert parsed["long_grpo"].max_flops == 3e15 and parsed["long_grpo"].max_steps > 10**5, "its three stages cost 1e15 each"
    assert parsed["long_grpo"].model == "small" and parsed["long_grpo"].train_data == parsed["direct_grpo"].train_data
    assert parsed["replay"].max_steps == UPDATES["bridge_grpo"] and parsed["replay"].student == f"{out}/bridge"
    assert parsed["no_opd"].rollouts_per_prompt == parsed["sft"].rollouts_per_prompt == 16  # 4 x ceil(10 / 3)
    assert (parsed["sft"].loss, parsed["no_opd"].loss, parsed["reward_free"].loss) == ("ce", "forward_kl", "reward_free")
    for name in ("no_warmup", "no_opd", "sft", "replay"):
        assert parsed[name].teacher == f"{out}/teacher_rl"
    assert parsed["reward_free"].teacher == "big", "no label reaches it by way of a teacher, not even in its figures"
    assert parsed["cold_grpo"].model == "small" and parsed["cold_grpo"].train_data == f"{tmp_path}/run/data/heldout.jsonl"


def test_every_stage_is_bound_to_the_labels_of_its_split(tmp_path, fake, problems):
    other = "--train-data other.jsonl --label-split other.jsonl"
    bridge.main(real(tmp_path, problems, arms=("all",), student_grpo_flags=other))
    for name, command in commands_of(fake).items():
        args = parse(command)
        split = "heldout" if name in ("bridge_grpo", "cold_grpo") else "train"
        assert args.label_split == f"{tmp_path}/run/data/{split}.jsonl", "whatever further flags say"


# ------------------------------------------------------------------------------------------------------------------ seeds
def test_seeds_share_the_world_and_nothing_else(tmp_path, fake):
    bridge.main(bridge.Args(out=str(tmp_path / "run"), arms=("bridge",), seeds=3, jobs=1))
    assert [c[0] for c in fake.commands].count("toy.py") == 1
    trained = [c for c in fake.commands if c[0] not in ("eval_math.py", "toy.py")]
    assert len(trained) == 9 and len(fake.preflights) == 1
    for command in trained:
        out = Path(flag(command, "--out"))
        assert out.parent.name == f"seed{flag(command, '--seed')}"
        models = [flag(command, f) for f in ("--teacher", "--student", "--model") if f in command]
        assert all(f"/{out.parent.name}/" in model or "/world/" in model for model in models)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["seeds"] == [1, 2, 3] and len(report["arms"]["bridge"]["by_seed"]) == 3


def test_stages_run_side_by_side_but_never_before_what_they_need(tmp_path):
    order, inside, most = [], [], []

    def task(name):
        def work():
            inside.append(name)
            most.append(len(inside))
            time.sleep(0.05)
            order.append(name)
            inside.remove(name)

        return work

    needs = {"a": [], "b": [], "c": ["a", "b"], "d": [], "e": ["c"], "f": ["d"]}
    stages.run_all({name: (before, task(name)) for name, before in needs.items()}, 2)
    assert sorted(order) == [*"abcdef"] and max(most) == 2
    assert all(order.index(b) < order.index(name) for name, before in needs.items() for b in before)


@pytest.mark.parametrize("jobs", [1, 2])
def test_behind_a_failure_nothing_more_is_started(jobs):
    started = []

    def fail():
        time.sleep(0.05)
        sys.exit(3)

    tasks = {"bad": ([], fail), "beside": ([], lambda: (time.sleep(0.1), started.append("beside")))}
    tasks |= {f"later{i}": ([], lambda i=i: started.append(i)) for i in range(20)}
    tasks["needs it"] = (["bad"], lambda: started.append("needs it"))
    with pytest.raises(SystemExit) as stop:
        stages.run_all(tasks, jobs)
    assert stop.value.code == 3 and started == ["beside"] * (jobs - 1)


def test_a_stage_beside_others_writes_to_a_log_and_its_last_line_is_shown(tmp_path, monkeypatch, capsys):
    script = tmp_path / "talk.py"
    script.write_text("import sys; print('much'); print('the reason', file=sys.stderr); sys.exit(5)")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        stages.call("talk.py", log=tmp_path / "talk.log")
    assert (tmp_path / "talk.log").read_text() == "much\nthe reason\n"
    out, err = capsys.readouterr()
    assert "$ python talk.py" in out and err.startswith("the reason\nerror: talk.py ended with exit code 5")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a child with its parent")
def test_a_stage_ends_when_the_driver_is_killed(tmp_path):
    """Otherwise it would still be writing when the same command is given again."""
    (tmp_path / "stage.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    code = "import pathlib; from infra import stages;"
    code += f"stages.ROOT = pathlib.Path({str(tmp_path)!r}); stages.call('stage.py')"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = iter(driver.stdout.readline, "")
    pid = next(int(line) for line in lines if line.strip().isdigit())
    driver.kill()
    driver.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the stage is still at work")


# ---------------------------------------------------------------------------------------------------------------- report
def test_report_json_holds_every_arm_and_stage(tmp_path, fake, problems):
    benchmarks = [write_jsonl(tmp_path / f"{name}.jsonl", [{"problem": "1*2?", "answer": "2"}]) for name in ("b", "other")]
    bridge.main(real(tmp_path, problems, arms=("all",), benchmarks=tuple(benchmarks)))
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(record) == {"benchmark", "arms", "stages", "seeds", "comparisons"} and record["benchmark"] == "b"
    assert list(record["arms"]) == [arm for arm in bridge.ARMS if arm != "bridge_own_prompts"]
    labels = dict.fromkeys(bridge.ARMS, 40) | {
        "base": 0,
        "raw_teacher": 0,
        "reward_free": 0,
        "bridge_grpo": 50,
        "cold_grpo": 10,
    }
    for arm, row in record["arms"].items():
        assert row["accuracy"] == pytest.approx(ACCURACY[arm]) and row["labels_used"] == labels[arm]
        low, high = row["ci95"]
        assert low <= ACCURACY[arm] <= high and row["se"] is None and row["by_seed"] == pytest.approx([ACCURACY[arm]])
        assert set(row["benchmarks"]) == {"b", "other"}
    assert set(record["stages"]) == set(ACCURACY) - {"own_prompts_warmup", "bridge_own_prompts"}
    assert record["stages"]["bridge"]["labels_used"] == 0 and record["stages"]["teacher_rl"]["labels_used"] == 40
    cost = {key: record["arms"]["bridge_grpo"][key] for key in ("rl_updates", "dense_updates", "sampled_tokens", "flops")}
    assert cost == {"rl_updates": 13, "dense_updates": 10, "sampled_tokens": 4000, "flops": 4e15}


def test_labels_that_two_stages_share_are_counted_once(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems, arms=("bridge_grpo",)))
    shared = tmp_path / "run/seed1"
    shutil.copy(shared / "teacher_rl/labels.json", shared / "bridge_grpo/labels.json")
    folders = [shared / stage for stage in bridge.stages_of(["bridge_grpo"])]
    assert report.cost([folders])["labels_used"] == 40


def test_the_papers_comparisons_have_a_difference_an_interval_and_a_verdict(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems, arms=("all",)))
    comparisons = json.loads((tmp_path / "run" / "report.json").read_text())["comparisons"]
    assert list(comparisons) == list(report.COMPARISONS)
    for name, row in comparisons.items():
        low, high = (ACCURACY[arm] for arm in name.split(" < "))
        assert row["difference"] == pytest.approx(high - low) and row["ci95"][0] <= row["difference"] <= row["ci95"][1]
        assert row["verdict"] == ("holds" if high - low > 0.03 else "not resolved"), name


def test_a_verdict_needs_the_whole_interval_on_one_side():
    assert [verdict(ci) for ci in ([0.01, 0.1], [-0.1, -0.01], [-0.01, 0.1], [0.0, 0.1], [-0.1, 0.0])] == [
        "holds", "reversed", "not resolved", "not resolved", "not resolved"]  # fmt: skip


def test_an_interval_is_over_seeds_and_problems():
    """Against the variances that the two have in theory: seeds' + problems' of the mean."""
    rng = np.random.default_rng(0)
    seeds, problems = rng.normal(0, 1, (40, 1)), rng.normal(0, 3, (1, 300))
    low, high = bootstrap_ci95(seeds + problems)
    expected = 2 * 1.98 * (seeds.var(ddof=1) / 40 + problems.var() / 300) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.05) and low < (seeds + problems).mean() < high
    one = rng.normal(0, 1, (1, 300))
    low, high = bootstrap_ci95(one)
    assert high - low == pytest.approx(2 * 1.96 * (one.var() / 300) ** 0.5, rel=0.05), "one seed: problems alone"
    assert bootstrap_ci95(np.repeat([[0.0], [1.0], [0.5]], 50, axis=1)) == [0, 1], "never beyond what there is"


def test_few_seeds_count_by_students_t():
    """Problems that are all alike leave the seeds alone: t of two degrees of freedom has 95 % within 4.303."""
    values = np.repeat([[0.40], [0.42], [0.46]], 50, axis=1) + np.eye(3, 50) * 1e-9
    low, high = np.percentile(drawn_means(values), [2.5, 97.5])
    half = 4.303 * np.std([0.40, 0.42, 0.46], ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_an_interval_of_three_seeds_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), []
    for _ in range(200):  # what a study looks like: seeds apart by 0.03, answers right or wrong
        values = rng.random((3, 128)) < 0.5 + rng.normal(0, 0.03, (3, 1)) + rng.normal(0, 0.1, (1, 128))
        low, high = bootstrap_ci95(values * 1.0)
        covered.append(low <= 0.5 <= high)
    assert np.mean(covered) >= 0.93


def test_a_difference_is_paired_by_problem(tmp_path, fake, problems):
    """Each arm is right on half of the problems, so its own interval is wide; the second is right on one more."""
    values = {"bridge": np.arange(100)[None] % 2 * 1.0}
    values["bridge_grpo"] = values["bridge"].copy()
    values["bridge_grpo"][0, :8:2] = 1
    row = report.compare(values)["bridge < bridge_grpo"]
    assert row["difference"] == pytest.approx(0.04) and row["ci95"][1] - row["ci95"][0] < 0.09 and row["verdict"] == "holds"


def test_report_md_is_a_table_with_the_plot(tmp_path, fake, problems):
    bridge.main(real(tmp_path, problems))
    text = (tmp_path / "run" / "report.md").read_text()
    assert re.search(r"\| bridge \| 0.800 \| 0.7\d\d to 0.8\d\d \| 40 \| 8 / 10 \| 0.00 M \| 3.0e\+15 \|", text)
    assert re.search(r"\| direct_grpo < bridge \| \+0.300 \| \+0.\d\d\d to \+0.\d\d\d \| holds \|", text)
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


def test_the_preflight_has_as_many_ranks_as_the_stages(fake, tmp_path, problems):
    bridge.main(real(tmp_path, problems, arms=("bridge",), nproc=2))
    [(_, before)] = fake.preflights
    assert before == 0 and fake.ranks == {2}


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


@pytest.mark.parametrize("world", list(worlds.WORLDS))
def test_results_md_shows_the_recorded_reports(world):
    record = json.loads((ROOT / f"benchmarks/results/{world}.json").read_text())
    assert f"<!-- report {world} -->\n{report.markdown(record)}\n<!-- end -->" in (ROOT / "docs/results.md").read_text()
    if world == "arithmetic":
        assert f"<!-- summary {world} -->\n{report.summary(record)}\n<!-- end -->" in (ROOT / "README.md").read_text()
    absent = {"bridge_own_prompts"}  # it needs prompts that are not the labeled problems
    assert set(record["arms"]) == set(bridge.ARMS) - absent and len(record["seeds"]) == 3


@pytest.mark.parametrize("world", list(worlds.WORLDS))
def test_results_md_shows_the_recorded_label_budgets(world):
    record = json.loads((ROOT / f"benchmarks/results/{world}_labels.json").read_text())
    shown = f"<!-- report {world}_labels -->\n{report.markdown(record)}\n<!-- end -->"
    assert shown in (ROOT / "docs/results.md").read_text()
    assert list(record["frontier"]) == "16 32 64 128 256 512".split() and len(record["seeds"]) == 3
    for budget, row in record["frontier"].items():
        assert all(arm["labels_used"] <= int(budget) for arm in row.values())
        assert row["long_grpo"]["flops"] >= row["bridge"]["flops"] * 0.99


def test_results_md_shows_both_students_of_swaps():
    block = (ROOT / "docs/results.md").read_text().split("<!-- other student -->\n")[1].split("\n<!-- end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    for (_, *shown), name in zip(rows, ["swaps", "swaps_other_student"], strict=True):
        record = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        recorded = {arm: one["accuracy"] for arm, one in (record["stages"] | record["arms"]).items()}
        by_hand = [one["accuracy"] for one in record.get("more_steps", {"runs": []})["runs"]]
        recorded |= {"long_grpo": sum(by_hand) / 3} if by_hand else {}
        assert shown == [f"{recorded[arm.strip('`')]:.3f}" for arm in head[1:]]


def test_results_md_shows_both_students_of_arithmetic_where_labels_are_scarce():
    block = (ROOT / "docs/results.md").read_text().split("<!-- other student of arithmetic -->\n")[1]
    block = block.split("\n<!-- end -->")[0]
    (_, *budgets), _, *rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
    studies = ("arithmetic_labels", "arithmetic_labels_other_student")
    names = [(study, arm) for study in studies for arm in ("long_grpo", "bridge", "bridge_own_prompts")]
    for (label, *shown), (study, arm) in zip(rows, names, strict=True):
        frontier = json.loads((ROOT / f"benchmarks/results/{study}.json").read_text())["frontier"]
        assert f"`{arm}`" in label and budgets == list(frontier)
        assert shown == [f"{frontier[n][arm]['accuracy']:.3f}" for n in budgets]


@pytest.mark.parametrize("study", ["arithmetic", "arithmetic_labels", "swaps", "swaps_labels"])
def test_the_scores_behind_a_report_give_its_figures(study):
    record = json.loads((ROOT / f"benchmarks/results/{study}.json").read_text())
    rows = record.get("frontier") or {None: record["arms"]}
    with np.load(ROOT / f"benchmarks/results/{study}.npz") as scores:
        for budget, row in rows.items():
            for arm, one in row.items():
                values = scores[f"test/labels{budget}/{arm}" if budget else f"test/{arm}"]
                assert values.shape == (3, 512) and values.mean(1).tolist() == one["by_seed"]
                assert bootstrap_ci95(values) == pytest.approx(one["ci95"])


def test_a_report_is_put_where_the_project_shows_it(tmp_path, fake, problems, monkeypatch):
    bridge.main(real(tmp_path, problems))
    run, project = tmp_path / "run", tmp_path / "project"
    for folder in (project / "docs", project / "benchmarks/results"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(report, "__file__", str(project / "infra/report.py"))
    (project / "docs/results.md").write_text("before\n<!-- report run -->\nold\n<!-- end -->\nafter\n")
    (project / "README.md").write_text("first\n<!-- summary run -->\nold\n<!-- end -->\nlast\n")
    report.main(report.Args(runs=(str(run),)))
    record = json.loads((run / "report.json").read_text())
    large, small = f"<!-- report run -->\n{report.markdown(record)}", f"<!-- summary run -->\n{report.summary(record)}"
    assert (project / "docs/results.md").read_text() == f"before\n{large}\n<!-- end -->\nafter\n"
    assert (project / "README.md").read_text() == f"first\n{small}\n<!-- end -->\nlast\n"
    assert (project / "docs/run.png").exists() and (project / "benchmarks/results/run.json").exists()
    (project / "README.md").write_text("no block: this world has no table here")
    report.main(report.Args(runs=(str(run),)))
    (project / "docs/results.md").write_text("no block")
    with pytest.raises(UsageError, match="docs/results.md has no block <!-- report run -->"):
        report.main(report.Args(runs=(str(run),)))


# -------------------------------------------------------------------------------------------------------------- for real
@pytest.mark.slow
def test_killed_again_and_again_the_report_is_that_of_a_run_left_alone(tmp_path):
    tiny = "--train-size 16 --heldout-size 16 --dev-size 8 --test-size 16 --teacher-steps 20 --student-steps 20"
    flags = ["--arms", "direct_grpo", "bridge", "--jobs", "2", f"--toy-flags={tiny}", "--eval-flags=--samples 2"]
    grpo_flags = "--max-steps 4 --prompts-per-step 8 --minibatch-prompts 4 --save-every 1 --eval-every 0"
    for stage in ("teacher-grpo", "student-grpo", "stage3"):
        flags += [f"--{stage}-flags={grpo_flags}"]
    flags += ["--warmup-flags=--max-steps 4 --rollouts-per-step 8 --save-every 1 --eval-every 0"]
    flags += ["--opd-flags=--max-steps 4 --prompts-per-step 8 --save-every 1 --eval-every 0"]

    def start(out):
        return subprocess.Popen([sys.executable, ROOT / "bridge.py", "--out", out, *flags], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "alone").wait() == 0
    killed, rng = tmp_path / "killed", random.Random(0)
    for begun in (
        "world",
        *(f"seed1/{stage}/metrics.jsonl" for stage in ("teacher_rl", "bridge_warmup", "bridge")),
        "seed1/eval",
    ):
        driver = start(killed)
        while driver.poll() is None and not (killed / begun).exists():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))  # into its steps; the measurements that follow take longer
        driver.kill()
        assert driver.wait() == -9, f"ended before {begun}"
    assert start(killed).wait() == 0
    reports = [(tmp_path / run / "report.json").read_text() for run in ("alone", "killed")]
    assert reports[0] == reports[1]
