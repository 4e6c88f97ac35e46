"""The summary against figures worked out by hand, with rewards that a fake grader decides."""

import json
from itertools import combinations

import numpy as np
import pytest
from conftest import read_jsonl, write_jsonl

import eval_math
import toy
from eval_math import pass_at_k
from infra import dataset
from infra.bootstrap import bootstrap_ci95
from infra.cli import UsageError

RIGHT = {"p0": 4, "p1": 2, "p2": 0, "p3": 1, "p4": 4, "p5": 3}  # right answers of 4 samples


@pytest.fixture
def measure(run_script, fake_grader, checkpoints, data, tmp_path):
    """eval_math.py on six problems with four samples each; RIGHT says how many of them are right."""
    fake_grader(lambda answer, j: float(j < RIGHT[answer]))

    def start(name="result", **changes):
        args = {"model": checkpoints.student, "benchmarks": (data,), "limit": 6, "samples": 4, "max_response_tokens": 12}
        return run_script("eval_math", out=tmp_path / name, **(args | changes)).out

    return start


def test_summary_equals_the_hand_computed_figures(measure):
    out = measure()
    summary = json.loads((out / "data" / "summary.json").read_text())
    assert set(summary) == {"accuracy", "ci95", "pass_at_k", "truncated_frac", "response_length", "problems", "samples",
                            "out_of_vocab", "unparsable", "grader_timeouts", "seconds", "command", "args"}  # fmt: skip
    assert summary["accuracy"] == pytest.approx(14 / 24) and (summary["problems"], summary["samples"]) == (6, 4)
    # pass@2: 1 - C(4 - c, 2) / 6 for c = 4, 2, 0, 1, 4, 3 right of 4
    assert summary["pass_at_k"] == pytest.approx({"1": 14 / 24, "2": (1 + 5 / 6 + 0 + 3 / 6 + 1 + 1) / 6, "4": 5 / 6})
    low, high = summary["ci95"]
    assert 0 <= low < summary["accuracy"] < high <= 1
    rows = read_jsonl(out / "data" / "generations.jsonl")
    assert summary["response_length"] == pytest.approx(np.mean([row["length"] for row in rows]))
    assert summary["truncated_frac"] == pytest.approx(np.mean([row["truncated"] for row in rows]))
    assert summary["args"]["samples"] == 4 and summary["command"].startswith("python eval_math.py")


def test_every_generation_is_written(measure, data):
    rows = read_jsonl(measure() / "data" / "generations.jsonl")
    problems = dataset.load_problems(data, "--benchmarks", True)[:6]
    assert [(row["problem"], row["sample"]) for row in rows] == [(p.text, j) for p in problems for j in range(4)]
    assert [row["reward"] for row in rows] == [float(j < RIGHT[f"p{i}"]) for i in range(6) for j in range(4)]
    assert [row["answer"] for row in rows] == [f"p{i}" for i in range(6) for _ in range(4)]
    tokenizer = toy.make_tokenizer()
    for row in rows:  # the text is the response alone, without the turn's end
        assert set(row) == {"problem", "answer", "sample", "reward", "length", "truncated", "response"}
        assert 1 <= row["length"] <= 12 and "<|im_end|>" not in row["response"]
        assert len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) <= row["length"]


def test_accuracy_is_that_of_the_real_grader(run_script, world):
    """Rewards equal the last box compared with the answer, on the toy's digits."""
    run = run_script(
        "eval_math",
        model=str(world / "teacher_base"),
        benchmarks=(str(world / "test.jsonl"),),
        samples=8,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_response_tokens=40,
    )
    rows = read_jsonl(run.out / "test" / "generations.jsonl")
    for row in rows:
        box = row["response"].rpartition("\\boxed{")[2]
        if row["response"].count("\\boxed{") and "}" in box:
            digits = box[: box.index("}")]
            if digits.isdigit():
                assert row["reward"] == float(int(digits) == int(row["answer"])), row
        else:
            assert row["reward"] == 0, row
    assert 0 < sum(row["reward"] for row in rows) < len(rows)


def test_the_same_seed_gives_the_same_generations(measure):
    texts = [[row["response"] for row in read_jsonl(measure(name, seed=seed) / "data" / "generations.jsonl")]
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_several_benchmarks_have_a_folder_each(measure, tmp_path, data):
    other = write_jsonl(tmp_path / "other.jsonl", [{"problem": "9-9?", "answer": "p0"}])
    out = measure(benchmarks=(data, other))
    assert {path.name for path in out.iterdir()} == {"data", "other"}
    assert json.loads((out / "other" / "summary.json").read_text())["accuracy"] == 1


def test_the_paper_sampling_settings_are_the_defaults():
    args = eval_math.Args()
    assert (args.temperature, args.top_p, args.top_k, args.samples) == (0.7, 0.8, 20, 16)


# ------------------------------------------------------------------------------------------------------------ formulas
def test_pass_at_k_equals_the_share_of_all_subsets():
    rewards = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        expected = np.mean([[max(row[list(chosen)]) for chosen in combinations(range(5), k)] for row in rewards])
        assert pass_at_k(rewards, k) == pytest.approx(expected)


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    rng = np.random.default_rng(5)
    values = (rng.random(400) < 0.3).astype(float)
    low, high = bootstrap_ci95(values)
    half = 1.96 * values.std() / len(values) ** 0.5
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.005) and (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert bootstrap_ci95(values) == [low, high]
    assert bootstrap_ci95(np.ones(7)) == [1, 1] and bootstrap_ci95(np.array([0.25])) == [0.25, 0.25]


# ------------------------------------------------------------------------------------------------------------- compare
def result(folder, rewards, problems=None):
    """A result folder with `rewards` {benchmark: (P, samples)}."""
    for name, rows in rewards.items():
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "generations.jsonl", [
            {"problem": (problems or {}).get(name, range(len(rows)))[i], "sample": j, "reward": reward}
            for i, row in enumerate(rows) for j, reward in enumerate(row)])  # fmt: skip
    return str(folder)


def test_compare_gives_the_paired_difference(tmp_path):
    """Problems differ much from each other and the models little: paired, the difference is clear."""
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5
    a = [[1.0, 1.0] if h else [0.0, float(i % 10 == 0)] for i, h in enumerate(hard)]
    b = [[1.0] if h else [0.0] for h in hard]  # another number of samples
    report = eval_math.compare(result(tmp_path / "a", {"x": a}), result(tmp_path / "b", {"x": b}))
    expected = np.mean(np.mean(a, 1) - np.mean(b, 1))
    assert report["x"]["difference"] == pytest.approx(expected) and report["x"]["problems"] == 200
    low, high = report["x"]["ci95"]
    assert 0 < low < expected < high < 0.1


def test_compare_ignores_the_order_of_the_problems(tmp_path):
    a = result(tmp_path / "a", {"x": [[1], [0], [1]]}, {"x": ["p", "q", "r"]})
    b = result(tmp_path / "b", {"x": [[1], [1], [0]]}, {"x": ["r", "p", "q"]})
    assert eval_math.compare(a, b)["x"]["difference"] == 0 and eval_math.compare(a, b)["x"]["ci95"] == [0, 0]


def test_compare_takes_folders_of_one_benchmark_or_of_several(tmp_path):
    both = {"x": [[1], [0]], "y": [[0], [0]]}
    a, b = result(tmp_path / "a", both), result(tmp_path / "b", {"y": [[1], [0]], "z": [[1]]})
    assert list(eval_math.compare(a, b)) == ["y"] and eval_math.compare(a, b)["y"]["difference"] == -0.5
    assert eval_math.compare(f"{a}/x", f"{b}/y")["x"]["difference"] == 0


@pytest.mark.parametrize("rewards, problems, message", [
    ({"x": [[1], [0]]}, {"x": ["p", "q"]}, "x was measured on different problems"),
    ({"x": [[1]]}, {"x": ["p"]}, "different problems.*--limit"),
])  # fmt: skip
def test_compare_refuses_different_problems(tmp_path, rewards, problems, message):
    a = result(tmp_path / "a", {"x": [[1], [0]]}, {"x": ["p", "r"]})
    with pytest.raises(UsageError, match=message):
        eval_math.compare(a, result(tmp_path / "b", rewards, problems))


def test_compare_refuses_different_benchmarks(tmp_path):
    a = result(tmp_path / "a", {"x": [[1]], "y": [[1]]})
    with pytest.raises(UsageError, match="share no benchmark"):
        eval_math.compare(a, result(tmp_path / "b", {"z": [[1]]}))


def test_the_compare_command_prints_what_compare_returns(cli, tmp_path):
    a, b = result(tmp_path / "a", {"x": [[1], [1], [0]]}), result(tmp_path / "b", {"x": [[1], [0], [0]]})
    code, out, _ = cli("eval_math", "--compare", a, b)
    assert code == 0 and "x: +0.3333  95 % interval [+0.0000, +1.0000]  (3 problems, paired)" in out
