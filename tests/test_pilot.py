"""The pilot: its commands replaced by fakes that write what the real ones would, its closed forms, its rule, and the
script that holds the rule against finished studies."""

import json
import shlex
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT, SCRIPTS, write_jsonl

import bridge
import toy
from benchmarks import pilot_rule
from infra import dataset, pilot, stages, worlds
from infra.cli import UsageError

RIGHT = {"teacher_base": 4, "student_base": 2, "teacher_probe": 12, "student_probe": 6}  # of 16 answers to each problem
FLOPS = {"kl": 5.0e12, "teacher_probe": 4e15, "student_probe": 4.5e15}


def flag(command, name):
    """The last of that name, which is the one that counts."""
    return command[len(command) - 1 - command[::-1].index(name) + 1]


@pytest.fixture
def fake(monkeypatch):
    """Replaces subprocess.run; `fake.commands` are the commands run, `fake.right` the right answers of 16 by model,
    `fake.kl` the KL of the first step, `fake.fail` the name of a stage that breaks."""
    state = SimpleNamespace(commands=[], right=dict(RIGHT), kl=0.2, fail=None)

    def run(command, **options):
        script, flags = str(Path(command[1]).relative_to(ROOT)), command[2:]
        state.commands.append([script, *flags])
        out, typed = Path(flag(flags, "--out")), shlex.join(["python", script, *flags])
        if state.fail == out.name:
            return SimpleNamespace(returncode=3)
        if script == "eval_math.py":
            samples = int(flag(flags, "--samples"))
            for spec in flags[flags.index("--benchmarks") + 1 : flags.index("--out")]:
                rows = [{"problem": p.key, "sample": s, "reward": float(s < state.right[out.name])}
                        for p in dataset.load_problems(spec, "--benchmarks", True) for s in range(samples)]  # fmt: skip
                folder = out / Path(spec).stem
                folder.mkdir(parents=True)
                write_jsonl(folder / "generations.jsonl", rows)
                (folder / "summary.json").write_text(json.dumps({"command": typed}))
        else:
            out.mkdir(parents=True, exist_ok=True)
            data = dataset.load_problems(flag(flags, "--train-data"), "--train-data", True)
            write_jsonl(out / "metrics.jsonl", [{"step": 1, "losses/reverse_kl": state.kl, "debug/topk_overlap": 0.9}])
            (out / "labels.json").write_text(json.dumps([p.key for p in data] if script == "grpo.py" else []))
            (out / "model.safetensors").write_text("weights")
            spent = {"updates": 10, "labels_used": len(data), "flops": FLOPS[out.name]}
            (out / "run.json").write_text(json.dumps({"finished": True, "command": typed} | spent))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    costs = {"--teacher": 3e9, "--student": 1e9}
    monkeypatch.setattr(pilot, "flops_of_response", lambda model, flag, folder, results: costs[flag])
    return state


@pytest.fixture
def problems(tmp_path):
    return write_jsonl(tmp_path / "problems.jsonl", [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(50)])


def asked(tmp_path, problems, **changes):
    """Arguments for real models, on local names; 40 of the 50 problems are for the first stages."""
    benchmarks = (write_jsonl(tmp_path / "b.jsonl", [{"problem": "1*2?", "answer": "2"}]),)
    args = {"out": str(tmp_path / "run"), "teacher": "big", "student": "small", "train_data": problems}
    args["benchmarks"] = benchmarks
    return bridge.Args(**(args | {"pilot": True} | changes))


def record_of(tmp_path):
    return json.loads((tmp_path / "run/pilot/pilot.json").read_text())


# ------------------------------------------------------------------------------------------------------------- commands
def test_the_probe_has_one_part_of_the_labels_and_is_measured_on_another(tmp_path, fake, problems):
    bridge.main(asked(tmp_path, problems, pilot_problems=12))
    out = tmp_path / "run/pilot"
    probe, heldout = (dataset.load_problems(str(out / f"{name}.jsonl"), "--x", True) for name in ("probe", "heldout"))
    train = dataset.load_problems(str(tmp_path / "run/data/train.jsonl"), "--x", True)
    assert probe + heldout == train[:24] and len(probe) == 12
    made = {str(Path(flag(c, "--out")).relative_to(out)): c for c in fake.commands}
    assert list(made) == list(pilot.COMMANDS), "each behind those it needs"
    for name, command in made.items():
        args = tyro.cli(SCRIPTS[command[0].removesuffix(".py")].Args, args=command[1:])
        if command[0] == "eval_math.py":
            both = (str(out / "probe.jsonl"), str(out / "heldout.jsonl"))
            assert args.benchmarks == (both if name.endswith("_base") else both[1:])
            assert (args.temperature, args.top_p, args.top_k, args.samples) == (1, 1, 0, 16)
        else:
            assert args.train_data == args.label_split == str(out / "probe.jsonl") and args.eval_every == 0
    models = [flag(made[f"eval/{name}"], "--model") for name in RIGHT]
    assert models == ["big", "small", str(out / "teacher_probe"), str(out / "student_probe")]


def test_both_probes_have_the_same_flops_and_the_user_s_settings(tmp_path, fake, problems):
    flags = {"teacher_grpo_flags": "--learning-rate 3e-5 --max-steps 400", "opd_flags": "--prompts-per-step 5"}
    bridge.main(asked(tmp_path, problems, pilot_steps=7, student_grpo_flags="--learning-rate 2e-5", **flags))
    teacher, student = (
        tyro.cli(SCRIPTS["grpo"].Args, args=c[1:]) for c in sorted(c for c in fake.commands if c[0] == "grpo.py")
    )
    assert (teacher.model, teacher.max_steps, teacher.learning_rate) == ("big", 7, 3e-5)
    assert (student.model, student.max_flops, student.learning_rate) == ("small", FLOPS["teacher_probe"], 2e-5)
    assert student.max_steps > 10**5 and teacher.max_flops is None
    [kl] = [tyro.cli(SCRIPTS["opd"].Args, args=c[1:]) for c in fake.commands if c[0] == "opd.py"]
    assert (kl.max_steps, kl.prompts_per_step) == (1, 20), "one step, on all problems of the probe"


def test_no_label_beyond_the_budget_is_consulted_and_all_are_counted(tmp_path, fake, problems):
    """Evaluation in training, or another file, would be labels that nobody counts."""
    other = "--eval-every 5 --eval-data other.jsonl --label-split other.jsonl"
    flags = {"teacher_grpo_flags": other, "student_grpo_flags": other, "opd_flags": other, "eval_flags": "--limit 3"}
    bridge.main(asked(tmp_path, problems, labels=(10,), **flags))
    record = record_of(tmp_path)
    assert (record["problems"], record["labels_used"], record["budget"]) == (5, 10, 10), "half the budget each"
    for command in fake.commands:
        args = tyro.cli(SCRIPTS[command[0].removesuffix(".py")].Args, args=command[1:])
        if command[0] == "eval_math.py":
            assert args.limit == 5
        else:
            assert args.eval_every == 0 and args.label_split == str(tmp_path / "run/pilot/probe.jsonl")


def test_all_flops_are_counted(tmp_path, fake, problems):
    bridge.main(asked(tmp_path, problems, pilot_problems=10))
    answers = 10 * 16 * 3 * (3e9 + 1e9)  # of both models to three sets: probe and held out before, held out after
    assert record_of(tmp_path)["flops"] == sum(FLOPS.values()) + answers


def test_what_is_finished_is_skipped_and_a_broken_stage_continued(tmp_path, fake, problems, capsys):
    fake.fail = "student_probe"
    with pytest.raises(SystemExit):
        bridge.main(asked(tmp_path, problems))
    done, fake.fail = [Path(flag(c, "--out")).name for c in fake.commands], None
    fake.commands.clear()
    bridge.main(asked(tmp_path, problems))
    again = [Path(flag(c, "--out")).name for c in fake.commands]
    assert done == ["kl", "teacher_base", "student_base", "teacher_probe", "student_probe"]
    assert again == ["student_probe", "teacher_probe", "student_probe"], "the probe, and both measurements behind it"
    first = record_of(tmp_path)
    fake.commands.clear()
    bridge.main(asked(tmp_path, problems))
    assert fake.commands == [] and record_of(tmp_path) == first
    with pytest.raises(UsageError, match="probe.jsonl: holds other problems than 7 problems; choose another --out"):
        bridge.main(asked(tmp_path, problems, pilot_problems=7))


def test_a_pair_that_does_not_fit_costs_no_answer(tmp_path, fake, problems):
    """opd.py compares them before its step; two stages at once would not wait for each other by chance."""
    fake.fail = "kl"
    with pytest.raises(SystemExit):
        bridge.main(asked(tmp_path, problems, jobs=2))
    assert [c[0] for c in fake.commands] == ["opd.py"]


def test_the_one_step_s_weights_are_thrown_away(tmp_path, fake, problems):
    bridge.main(asked(tmp_path, problems))
    assert [path.parent.name for path in sorted((tmp_path / "run/pilot").rglob("*.safetensors"))] == [
        "student_probe", "teacher_probe"]  # fmt: skip
    assert not (tmp_path / "run/seed1").exists() and not (tmp_path / "run/report.json").exists(), "no stage was trained"


@pytest.mark.parametrize("changes, message", [
    ({"labels": (1,)}, "--pilot: a budget of 1 label has none to hold out"),
    ({"labels": (8, 16)}, "--pilot: one budget and one seed at a time"),
    ({"seeds": 2}, "--pilot: one budget and one seed at a time"),
    ({"pilot_samples": 7}, "--pilot-samples 7: give 8, a group, or more"),
    ({"pilot_problems": 0}, "--pilot-problems 0: must be above 0"),
    ({"pilot_steps": 0}, "--pilot-steps 0: must be above 0"),
])  # fmt: skip
def test_bad_flags_are_refused(tmp_path, fake, problems, changes, message):
    with pytest.raises(UsageError, match=message):
        bridge.main(asked(tmp_path, problems, **changes))
    assert fake.commands == []


# -------------------------------------------------------------------------------------------------------------- figures
def test_the_share_of_mixed_groups_is_that_of_all_groups_of_8():
    rng = np.random.default_rng(0)
    right = rng.random((20, 12)) < rng.random((20, 1))
    right[:2] = [[0] * 12, [1] * 12]
    groups = [right[:, list(some)] for some in combinations(range(12), 8)]
    counted = np.mean([group.any(1) & ~group.all(1) for group in groups], axis=0)
    assert pilot.mixed_share(right) == pytest.approx(counted)
    assert counted[:2].tolist() == [0, 0]


def test_the_share_is_unbiased_for_a_problem_of_any_difficulty():
    p, rng = 0.1, np.random.default_rng(1)
    shares = pilot.mixed_share(rng.random((20_000, 16)) < p)
    assert shares.mean() == pytest.approx(1 - p**8 - (1 - p) ** 8, abs=3 * shares.std() / 20_000**0.5)


def test_the_models_figures_by_hand(tmp_path, fake, problems):
    fake.right |= {"teacher_base": 16, "student_base": 1}
    bridge.main(asked(tmp_path, problems))
    models = record_of(tmp_path)["models"]
    assert models["teacher"] == {"pass_at_1": 1, "pass_at_k": 1, "mixed_groups": 0, "signals_per_1000_samples": 0,
                                 "signals_per_pflop": 0}  # fmt: skip
    student = models["student"]
    assert (student["pass_at_1"], student["pass_at_k"], student["mixed_groups"]) == (1 / 16, 1, 0.5)
    assert student["signals_per_1000_samples"] == 1000 / 8 * 0.5
    group = 8 * 1e9 + 0.5 * 8 * 3e9  # its answers are sampled, and if it is mixed pass forward and backward
    assert student["signals_per_pflop"] == pytest.approx(0.5 / group * 1e15)


def test_the_probe_s_gain_and_the_paired_difference(tmp_path, fake, problems):
    bridge.main(asked(tmp_path, problems))
    record = record_of(tmp_path)
    for role, (before, after) in {"teacher": (4, 12), "student": (2, 6)}.items():
        row = record["probe"][role]
        assert (row["before"], row["after"], row["gain"]) == (before / 16, after / 16, (after - before) / 16)
        assert row["after_ci95"] == [after / 16] * 2 and row["flops"] == FLOPS[f"{role}_probe"]
    assert record["difference"] == 6 / 16 and record["ci95"] == [6 / 16] * 2
    assert (record["reverse_kl"], record["topk_overlap"]) == (0.2, 0.9)


def test_the_difference_is_paired_by_problem(tmp_path, monkeypatch, fake, problems):
    """Half of the problems are hopeless for both models; on the others the teacher is a little better."""
    real, answers = pilot.rewards_of, {"teacher_probe": 10, "student_probe": 9}

    def half(folder):
        name = folder.parent.name
        return {p: [float(s < answers.get(name, 4) and i % 2) for s in range(16)] for i, p in enumerate(real(folder))}

    monkeypatch.setattr(pilot, "rewards_of", half)
    bridge.main(asked(tmp_path, problems))
    record = record_of(tmp_path)
    assert record["recommendation"] == pilot.TEACHER and 0 < record["ci95"][0] < record["ci95"][1] < 0.06
    assert record["probe"]["teacher"]["after_ci95"][0] < record["probe"]["student"]["after_ci95"][1], "unpaired they overlap"


# ----------------------------------------------------------------------------------------------------------------- rule
@pytest.mark.parametrize("teacher, student, kl, expected", [
    (12, 6, 0.2, pilot.TEACHER),
    (6, 12, 0.2, pilot.STUDENT),
    (9, 9, 0.2, pilot.CLOSE),
    (12, 6, 1.5, pilot.CLOSE),  # nothing could be handed down as it is
    (6, 12, 1.5, pilot.STUDENT),
])  # fmt: skip
def test_the_rule_has_three_outcomes(tmp_path, fake, problems, capsys, teacher, student, kl, expected):
    fake.right |= {"teacher_probe": teacher, "student_probe": student}
    fake.kl = kl
    bridge.main(asked(tmp_path, problems))
    record, text = record_of(tmp_path), (tmp_path / "run/pilot/pilot.md").read_text()
    assert record["recommendation"] == record["rules"]["probe"] == expected
    shown = capsys.readouterr().out
    assert f"Recommendation: **{expected}**." in text and text.split("\n\n", 1)[1].strip() in shown
    assert any("KL(student || teacher) is above 1 nats" in doubt for doubt in record["doubts"]) == (kl > 1 and teacher == 12)


def test_an_interval_that_touches_0_decides_nothing():
    assert [pilot.recommend(ci95) for ci95 in ([0.0, 0.1], [-0.1, 0.0], [-0.1, 0.1])] == [pilot.CLOSE] * 3


def test_the_cheap_rule_counts_groups_per_flop(tmp_path, fake, problems):
    """Here the teacher has mixed groups more often, and pays three times as much for each answer."""
    bridge.main(asked(tmp_path, problems))
    record = record_of(tmp_path)
    assert record["models"]["teacher"]["mixed_groups"] > record["models"]["student"]["mixed_groups"]
    assert record["rules"] == {"probe": pilot.TEACHER, "cheap": pilot.STUDENT}


def test_doubts_name_what_a_longer_or_larger_probe_may_turn(tmp_path, fake, problems):
    fake.right |= {"teacher_base": 8, "teacher_probe": 10, "student_base": 1, "student_probe": 8}
    bridge.main(asked(tmp_path, problems, pilot_problems=16))
    longer, larger = record_of(tmp_path)["doubts"]
    assert longer.startswith("the teacher is ahead, but the student has gained more") and "--pilot-steps" in longer
    assert larger.startswith("the probe saw 16 labels of a budget of 40") and "--pilot-problems" in larger


@pytest.mark.parametrize("labels, n, doubts", [(30, 15, 1), (31, 15, 1), (32, 16, 0), (33, 16, 0)])
def test_few_problems_decide_nothing(tmp_path, fake, problems, labels, n, doubts):
    """And an odd budget's half is no doubt."""
    bridge.main(asked(tmp_path, problems, labels=(labels,), warmup_flags="--rollouts-per-step 8"))
    record = record_of(tmp_path)
    assert record["problems"] == n and len(record["doubts"]) == doubts
    assert set(record["rules"].values()) == ({pilot.CLOSE} if n < 16 else {pilot.TEACHER, pilot.STUDENT})
    assert all(doubt.startswith("15 held-out problems decide nothing") for doubt in record["doubts"])


def test_graded_rewards_that_are_all_alike_are_no_signal():
    assert pilot.mixed_share(np.full((2, 16), 0.5)) == pytest.approx([0, 0])
    assert pilot.mixed_share(np.array([[0.5] * 15 + [-1.0]])) == pytest.approx([0.5]), "8 of 16 draws have the odd one"


# ------------------------------------------------------------------------------------------- the rule against studies
def point(bridge_, long_grpo, truth, probe, cheap=pilot.STUDENT):
    rules = {"probe": probe, "cheap": cheap, "always the bridge": pilot.TEACHER}
    where = {"world": "arithmetic", "skill": 0.8, "labels": 16, "seed": 1}
    return where | {"bridge": bridge_, "long_grpo": long_grpo, "truth": truth, "rules": rules}


def test_hits_misses_and_regret_are_counted_by_rule():
    rows = [point(0.8, 0.6, pilot.TEACHER, pilot.TEACHER), point(0.5, 0.7, pilot.STUDENT, pilot.CLOSE),
            point(0.71, 0.7, pilot.CLOSE, pilot.CLOSE)]  # fmt: skip
    found = pilot_rule.totals(rows)
    assert found["probe"] == {"hit": 2, "miss": 0, "open": 1, "regret": pytest.approx((0 + 0.1 + 0.005) / 3)}
    assert found["cheap"] == {"hit": 1, "miss": 1, "open": 1, "regret": pytest.approx((0.2 + 0 + 0.01) / 3)}
    assert found["always the bridge"] == {"hit": 1, "miss": 1, "open": 1, "regret": pytest.approx((0 + 0.2 + 0) / 3)}
    text = pilot_rule.markdown(rows)
    assert "| arithmetic | 0.8 | 16 | 1 | 0.500 | 0.700 | student directly | the two are close (open) | student" in text
    assert "| always the bridge | 1 | 1 | 1 | 0.0667 |" in text


def test_pilot_md_shows_the_recorded_points():
    record = json.loads((ROOT / "benchmarks/results/pilot_rule.json").read_text())
    shown = pilot_rule.markdown(record["points"]).split("\n\n")[-1]
    assert record["totals"] == pilot_rule.totals(record["points"]) and shown in (ROOT / "docs/pilot.md").read_text()
    expected = {(world, toy.Args.student_skill): 6 * 3 for world in worlds.WORLDS}
    expected |= {("arithmetic", skill): 2 for skill in pilot_rule.Args.skills}
    assert Counter((row["world"], row["skill"]) for row in record["points"]) == expected, "budgets x seeds"
    for row in record["points"]:
        study = row["world"] if row["skill"] == toy.Args.student_skill else f"skill{row['skill']}"
        study = json.loads((ROOT / f"benchmarks/results/{study}_labels.json").read_text())
        difference = study["frontier_differences"][str(row["labels"])]["long_grpo < bridge"]
        assert row["truth"] == pilot.recommend(difference["ci95"])
        for arm in pilot_rule.ARMS:
            assert row[arm] == study["frontier"][str(row["labels"])][arm]["by_seed"][row["seed"] - 1]


def test_every_budget_and_seed_of_a_study_is_asked_about(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(pilot_rule, "ROOT", tmp_path)
    study, reports = tmp_path / "rule/swaps", tmp_path / "benchmarks/results"
    args = pilot_rule.Args(worlds=("swaps",), out=str(tmp_path / "rule"), skills=(), pilot_problems=16, jobs=1)
    with pytest.raises(UsageError, match="--worlds swaps: the study of swaps has not been run"):
        pilot_rule.main(args)
    (study / "world").mkdir(parents=True)
    command = shlex.join(["python", "toy.py", "--world", "swaps", "--out", f"{study}/world", "--seed", "1"])
    (study / "world/toy.json").write_text(
        json.dumps({"args": {"world": "swaps", "student_skill": 0.6}, "command": command, "finished": True})
    )
    write_jsonl(study / "world/train.jsonl", [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(50)])
    budgets, right = ("8", "32", "40"), {"bridge": [0.8, 0.7], "long_grpo": [0.3, 0.4]}
    reports.mkdir(parents=True)
    truth = {n: {"long_grpo < bridge": {"ci95": [-0.1 if n == "40" else 0.2, 0.5]}} for n in budgets}
    frontier = {n: {arm: {"by_seed": values} for arm, values in right.items()} for n in budgets}
    report = {"seeds": [1, 2], "frontier": frontier, "frontier_differences": truth}
    (reports / "swaps_labels.json").write_text(json.dumps(report))

    pilot_rule.main(args)
    rows = json.loads((tmp_path / "rule/pilot_rule.json").read_text())["points"]
    assert [(row["labels"], row["seed"]) for row in rows] == [(8, 1), (8, 2), (32, 1), (32, 2), (40, 1), (40, 2)]
    assert [row["truth"] for row in rows] == [pilot.TEACHER] * 4 + [pilot.CLOSE] * 2
    assert [row["rules"]["probe"] for row in rows] == [pilot.CLOSE] * 2 + [pilot.TEACHER] * 4, "4 problems decide nothing"
    assert all(row["world"] == "swaps" for row in rows)
    assert [row["bridge"] for row in rows] == [0.8, 0.7] * 3
    asked = {Path(flag(c, "--train-data")).parent: c for c in fake.commands if c[0] == "opd.py"}
    counts = [len(dataset.load_problems(str(folder / "probe.jsonl"), "--x", True)) for folder in asked]
    assert counts == [4, 4, 16, 16], "half the budget, at most --pilot-problems; 32 and 40 labels share their pilots"
    assert [flag(c, "--seed") for c in asked.values()] == ["1", "2", "1", "2"]
    assert {flag(c, "--student") for c in asked.values()} == {f"{study}/world/student_base"}
    fake.commands.clear()
    pilot_rule.main(args)
    assert fake.commands == []


# ------------------------------------------------------------------------------------------------------------- for real
@pytest.mark.slow
def test_a_pilot_of_a_tiny_world_and_its_study(tmp_path):
    """All of it as commands: a study of one budget, its pilot, the table; and again, with nothing left to do."""
    sizes = "--train-size 32 --heldout-size 8 --dev-size 8 --test-size 16 --unlabeled-size 16"
    short = {"teacher-grpo": "--max-steps 1 --eval-every 0", "student-grpo": "--eval-every 0",
             "warmup": "--max-steps 1 --rollouts-per-step 16 --eval-every 0", "opd": "--max-steps 1 --eval-every 0",
             "eval": "--samples 1"}  # fmt: skip
    flags = shlex.join(f"--{name}-flags={text}" for name, text in short.items())
    command = [sys.executable, "benchmarks/pilot_rule.py", "--out", str(tmp_path), "--worlds", "--skills", "0.6"]
    command += [f"--toy-flags={sizes} --teacher-steps 20 --student-steps 20", f"--bridge-flags={flags}"]
    command += ["--labels", "16", "--pilot-steps", "1"]
    first = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    record = json.loads((tmp_path / "skill0.6/pilots/8/seed1/pilot.json").read_text())
    assert (record["problems"], record["labels_used"], record["samples"]) == (8, 16, 16)
    probes = record["probe"].values()
    assert all(row["labels_used"] == 8 and row["flops"] > 0 for row in probes)
    assert record["probe"]["student"]["flops"] >= record["probe"]["teacher"]["flops"]
    assert record["flops"] > sum(row["flops"] for row in probes) and record["reverse_kl"] > 0
    assert "| always the bridge |" in first.stdout
    again = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("# finished before: ") >= len(pilot.COMMANDS)
    assert "grpo.py" not in again.stdout.replace("# finished before: python grpo.py", "")
