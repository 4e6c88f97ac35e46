"""Label budgets: which stages run with which labels and prompts, and what is made of their results."""

import json
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import SCRIPTS, read_jsonl, write_jsonl
from test_bridge import fake, flag, problems, real

import bridge
import toy
from infra import dataset, frontier
from infra.cli import UsageError

ARMS = ("direct_grpo", "long_grpo", "raw_teacher", "bridge", "bridge_own_prompts")


@pytest.fixture
def unlabeled(tmp_path):
    return write_jsonl(tmp_path / "unlabeled.jsonl", [{"problem": f"{i}+2?", "answer": "planted"} for i in range(30)])


def commands(fake):
    """{folder: command} of the stages that were trained."""
    return {flag(c, "--out"): c for c in fake.commands if c[0] not in ("eval_math.py", "toy.py")}


def test_each_budget_has_its_labels_and_what_needs_none_runs_once(tmp_path, fake, problems, unlabeled):
    args = real(tmp_path, problems, arms=ARMS, labels=(8, 16), unlabeled_data=unlabeled, seeds=2)
    bridge.main(args)
    made, out = commands(fake), args.out
    for seed in (1, 2):
        assert f"{out}/seed{seed}/raw_teacher" in made and f"{out}/labels8/seed{seed}/raw_teacher" not in made
        for n in (8, 16):
            command = made[f"{out}/labels{n}/seed{seed}/direct_grpo"]
            assert flag(command, "--train-data") == flag(command, "--label-split") == f"{out}/data/labels{n}.jsonl"
            command = made[f"{out}/labels{n}/seed{seed}/bridge"]
            assert flag(command, "--teacher") == f"{out}/labels{n}/seed{seed}/teacher_rl"
            assert flag(command, "--train-data") == f"{out}/data/unlabeled.jsonl"
            command = made[f"{out}/labels{n}/seed{seed}/bridge_own_prompts"]
            assert flag(command, "--train-data") == f"{out}/data/labels{n}.jsonl"
    assert len(made) == 2 * (2 + 2 * 7)
    small, large = (read_jsonl(Path(out, f"data/labels{n}.jsonl")) for n in (8, 16))
    assert large[:8] == small and len(large) == 16, "the budgets are nested"
    for command in made.values():
        tyro.cli(SCRIPTS[command[0].removesuffix(".py")].Args, args=command[1:])


def test_a_budget_may_be_added_on_either_side(tmp_path, fake, problems, unlabeled):
    for labels in ((8,), (8, 16), (4, 8, 16)):
        fake.commands.clear()
        bridge.main(real(tmp_path, problems, arms=ARMS, labels=labels, unlabeled_data=unlabeled))
        new = labels[0] if labels[0] == 4 else labels[-1]
        rest = [folder for folder in commands(fake) if f"/labels{new}/" not in folder]
        assert [Path(folder).name for folder in rest] == (["raw_teacher_warmup", "raw_teacher"] if labels == (8,) else [])


def test_answers_of_the_unlabeled_prompts_reach_no_stage(tmp_path, fake, problems, unlabeled):
    args = real(tmp_path, problems, arms=ARMS, labels=(8,), unlabeled_data=unlabeled)
    bridge.main(args)
    written = Path(args.out, "data/unlabeled.jsonl").read_text()
    assert "planted" not in written and all("answer" not in json.loads(line) for line in written.splitlines())
    assert all(unlabeled not in command for command in fake.commands), "only the copy without answers is read"
    rows = [row | {"answer": "another"} for row in read_jsonl(Path(unlabeled))]
    again = real(tmp_path, problems, arms=ARMS, labels=(8,), unlabeled_data=write_jsonl(tmp_path / "other.jsonl", rows))
    done, fake.commands = len(fake.commands), []
    bridge.main(again)
    assert done and fake.commands == [], "with other answers every stage is finished already"


def test_no_arm_has_consulted_more_labels_than_its_budget(tmp_path, fake, problems, unlabeled):
    args = real(tmp_path, problems, arms=(*ARMS, "bridge_grpo", "cold_grpo"), labels=(8, 16), unlabeled_data=unlabeled)
    bridge.main(args)
    record = json.loads(Path(args.out, "report.json").read_text())
    assert "held-out labels besides: bridge_grpo, cold_grpo." in Path(args.out, "report.md").read_text()
    assert record["arms"]["bridge_grpo"]["labels_used"] == 16 + 10
    assert [folder for folder in commands(fake) if "bridge_grpo" in folder] == [f"{args.out}/labels16/seed1/bridge_grpo"]
    for n in (8, 16):
        used = {arm: row["labels_used"] for arm, row in record["frontier"][str(n)].items()}
        assert used == {arm: 0 if arm == "raw_teacher" else n for arm in ("teacher_rl", *ARMS)}
        assert set(record["frontier"][str(n)]["bridge"]) == {"accuracy", "ci95", "labels_used", "flops", "by_seed"}
    assert record["label_efficiency"].keys() == {"direct_grpo", "long_grpo"}
    assert record["arms"]["bridge"]["labels_used"] == 16, "the arms are those of the largest budget"
    with np.load(Path(args.out, "scores.npz")) as scores:
        for n in (8, 16):
            assert scores[f"b/labels{n}/bridge"].mean() == record["frontier"][str(n)]["bridge"]["accuracy"]
        assert scores["b/base"].shape == (1, 100) and scores["b/base"].mean() == record["stages"]["base"]["accuracy"]
    assert (Path(args.out) / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "![](frontier.png)" in Path(args.out, "report.md").read_text()


@pytest.mark.parametrize("arms, at_each", [
    (("base", "direct_grpo", "bridge_grpo"), ("base", "direct_grpo")),
    (("direct_grpo", "replay"), ("direct_grpo",)),  # which waits for bridge_grpo's number of updates
    (("raw_teacher",), ("raw_teacher",)),
])  # fmt: skip
def test_arms_with_held_out_labels_run_with_the_largest_budget_alone(tmp_path, fake, problems, unlabeled, arms, at_each):
    args = real(tmp_path, problems, arms=arms, labels=(8, 16), unlabeled_data=unlabeled)
    bridge.main(args)
    record = json.loads(Path(args.out, "report.json").read_text())
    assert set(record["arms"]) == set(arms) and all(tuple(row) == at_each for row in record["frontier"].values())
    ran = {Path(folder).name for folder in commands(fake) if "/labels8/" in folder}
    assert ran == {"direct_grpo"} & set(at_each)


def test_one_budget_may_have_held_out_arms_alone(tmp_path, fake, problems, unlabeled):
    args = real(tmp_path, problems, arms=("bridge_grpo",), labels=(8,), unlabeled_data=unlabeled)
    bridge.main(args)
    record = json.loads(Path(args.out, "report.json").read_text())
    assert "frontier" not in record and record["arms"]["bridge_grpo"]["labels_used"] == 18


def test_a_benchmark_without_answers_ends_the_run_before_its_first_stage(tmp_path, fake, problems):
    benchmark = write_jsonl(tmp_path / "asked.jsonl", [{"problem": "9*9?"}])
    with pytest.raises(UsageError, match="--benchmarks .*asked.jsonl"):
        bridge.main(real(tmp_path, problems, benchmarks=(benchmark,)))
    assert fake.commands == []


def test_without_budgets_unlabeled_prompts_serve_the_dense_stages_alone(tmp_path, fake, problems, unlabeled):
    args = real(tmp_path, problems, unlabeled_data=unlabeled)
    bridge.main(args)
    for folder, command in commands(fake).items():
        data = {"grpo.py": "heldout" if folder.endswith("bridge_grpo") else "train"}.get(command[0], "unlabeled")
        assert flag(command, "--train-data") == f"{args.out}/data/{data}.jsonl"


def test_an_embedded_world_brings_its_unlabeled_prompts(tmp_path, fake):
    bridge.main(bridge.Args(out=str(tmp_path / "run"), arms=("bridge",), labels=(16, 64), jobs=1))
    names = ("train", "heldout", "dev", "test", "unlabeled")
    sets = {name: read_jsonl(tmp_path / f"run/world/{name}.jsonl") for name in names}
    assert len(sets["unlabeled"]) == 2048 and all(row.keys() == {"problem"} for row in sets["unlabeled"])
    texts = [row["problem"] for rows in sets.values() for row in rows]
    assert len(texts) == len(set(texts)), "no problem is in two sets"


def test_the_unlabeled_set_changes_no_other(tmp_path):
    for size in (8, 64):
        toy.write_problems(toy.Args(out=str(tmp_path / f"{size}"), unlabeled_size=size))
    for name in ("train", "heldout", "dev", "test"):
        assert (tmp_path / f"8/{name}.jsonl").read_text() == (tmp_path / f"64/{name}.jsonl").read_text()


def test_problems_to_measure_that_are_trained_on_are_said(tmp_path, fake, problems, unlabeled, capsys):
    benchmark = write_jsonl(tmp_path / "test.jsonl", [{"problem": p, "answer": "9"} for p in ("9*9?", "7+2?", "3+1?")])
    bridge.main(real(tmp_path, problems, arms=("base",), benchmarks=(benchmark,), unlabeled_data=unlabeled))
    said = capsys.readouterr().out
    assert f"warning: 2 of 3 problems to measure are among those to train on (first: --benchmarks {benchmark}, " in said
    assert f"is --unlabeled-data {unlabeled}" in said


def test_a_benchmark_that_is_not_there_ends_the_run_before_its_first_stage(tmp_path, fake, problems):
    with pytest.raises(UsageError, match="--benchmarks .*missing.jsonl"):
        bridge.main(real(tmp_path, problems, benchmarks=(str(tmp_path / "missing.jsonl"),)))
    assert fake.commands == []


@pytest.mark.parametrize("changes, message", [
    ({"labels": (16, 8)}, "--labels 16 8: give numbers above 0, the smallest first"),
    ({"labels": (8, 8)}, "smallest first"),
    ({"labels": (0, 8)}, "above 0"),
    ({"labels": (8, 41)}, "--labels 8 41: .* has only 40 problems"),
    ({"arms": ("bridge_own_prompts",)}, "--arms bridge_own_prompts: needs --unlabeled-data"),
])  # fmt: skip
def test_bad_budgets_are_refused(tmp_path, fake, problems, changes, message):
    with pytest.raises(UsageError, match=message):
        bridge.main(real(tmp_path, problems, **changes))
    assert fake.commands == []


# ----------------------------------------------------------------------------------------------------- label efficiency
def curves(seeds=3, problem_count=200, **accuracy):
    """{budget: {arm: (S, P)}} in which the first so many problems are right, the same for each seed."""
    budgets = (16, 32, 64, 128)
    right = np.arange(problem_count) / problem_count
    return {n: {arm: np.tile(right < line[k], (seeds, 1)) * 1.0 for arm, line in accuracy.items()}
            for k, n in enumerate(budgets)}  # fmt: skip


def test_a_bridge_that_is_one_budget_ahead_needs_half_the_labels():
    values = curves(direct_grpo=(0.2, 0.4, 0.6, 0.8), bridge=(0.4, 0.6, 0.8, 0.9))
    found = frontier.label_efficiency(values, "direct_grpo")
    assert found[16]["outside"] == "below" and found[16]["factor"] is None
    for n in (32, 64, 128):
        assert found[n]["factor"] == pytest.approx(2) and found[n]["ci95"][0] <= 2.0001 and found[n]["ci95"][1] >= 1.9999


def test_between_two_budgets_labels_are_interpolated_over_their_logarithm():
    values = curves(direct_grpo=(0.1, 0.2, 0.3, 0.5), bridge=(0.4, 0.6, 0.8, 0.9))
    assert frontier.label_efficiency(values, "direct_grpo")[128]["factor"] == pytest.approx(128 / (16 * 2**0.5))


def test_an_accuracy_that_the_bridge_never_reaches_is_outside():
    values = curves(direct_grpo=(0.2, 0.4, 0.6, 0.8), bridge=(0.1, 0.2, 0.3, 0.7))
    found = frontier.label_efficiency(values, "direct_grpo")
    assert found[128]["outside"] == "above" and found[128]["factor"] is None
    assert frontier.efficiency_cell(found[128]) == "outside the range: less than 1.0 x"
    below = frontier.label_efficiency(curves(direct_grpo=(0.1, 0.2, 0.3, 0.4), bridge=(0.5,) * 4), "direct_grpo")[128]
    assert frontier.efficiency_cell(below) == "outside the range: more than 8.0 x"


def test_labels_that_bring_the_reference_nothing_do_not_count_for_the_bridge():
    """Direct GRPO has with 64 labels what it has with 128: that it was given 128 makes the bridge no better."""
    values = curves(direct_grpo=(0.2, 0.4, 0.6, 0.6), bridge=(0.4, 0.6, 0.8, 0.9))
    found = frontier.label_efficiency(values, "direct_grpo")
    assert found[64]["factor"] == found[128]["factor"] == pytest.approx(2)


def test_a_dip_in_the_bridges_curve_does_not_count_twice():
    needed = frontier.labels_needed(np.array([16.0, 32, 64]), np.array([0.5, 0.4, 0.6]), 0.5)
    assert needed == pytest.approx(16)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    values = curves(direct_grpo=(0.2, 0.4, 0.6, 0.8), bridge=(0.4, 0.6, 0.8, 0.9))
    shift = {n: {arm: rng.normal(0, 0.1, (3, 1)) for arm in row} for n, row in values.items()}
    noisy = {n: {arm: np.clip(one + shift[n][arm], 0, 1) for arm, one in row.items()} for n, row in values.items()}
    width = [np.diff(frontier.label_efficiency(v, "direct_grpo")[64]["ci95"]) for v in (values, noisy)]
    assert width[1] > width[0]


def test_problems_of_an_unlabeled_file_keep_no_answer(tmp_path):
    problem = dataset.Problem("1+1?", ({"role": "system", "content": "be brief"},), None)
    path = dataset.write_problems(tmp_path / "x.jsonl", [problem], "here")
    assert dataset.load_problems(path, "--x", need_answers=False) == [problem]
