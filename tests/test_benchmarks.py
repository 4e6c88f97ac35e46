"""What the recorded runs of benchmarks/ rest on."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import real_model
from infra.dataset import load_problems


def test_the_real_model_s_problems_are_right_and_in_one_split_each(tmp_path):
    real_model.write_problems(tmp_path)
    splits = {
        name: load_problems(str(tmp_path / f"{name}.jsonl"), "--x", need_answers=name != "unlabeled")
        for name in real_model.SPLITS
    }
    assert {name: len(problems) for name, problems in splits.items()} == real_model.SPLITS
    texts = [p.text for problems in splits.values() for p in problems]
    assert len(set(texts)) == len(texts)
    pairs = {name: set() for name in splits}
    for name, problems in splits.items():
        for problem in problems:
            a, b = map(int, re.findall(r"\d+", problem.text))
            right = str(a - b if re.search("gives away|takes", problem.text) else a + b)
            assert problem.answer == (None if name == "unlabeled" else right), problem.text
            assert len(problem.messages) == 3 and problem.text not in str(problem.messages)
            pairs[name].add((min(a, b), max(a, b), right == str(a + b)))
    assert len(pairs["test"]) == 22 and pairs["dev"] and pairs["unlabeled"]
    assert all(not pairs["test"] & some for name, some in pairs.items() if name != "test")


def test_the_real_model_s_reward_is_the_last_number():
    right = {"9": True, "4 + 5 = 9": True, "9, or 8": False, "4 + 5 = 19": False, "9.": True, "nine": False, "": False}
    assert {text: real_model.last_number(text, "9") == 1 for text in right} == right


def test_the_real_model_s_record_says_what_its_scores_say(tmp_path):
    results, page = ROOT / "benchmarks/results", (ROOT / "benchmarks/results/real_model_cpu.md").read_text()
    real_model.write_problems(tmp_path)
    problems = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    record = json.loads((results / "real_model.json").read_text())
    with np.load(results / "real_model.npz") as scores:
        assert real_model.by_sum(scores, problems) in page
        for budget, row in record["frontier"].items():
            assert all(scores[f"test/labels{budget}/{arm}"].mean(1).tolist() == row[arm]["by_seed"] for arm in row)
            for arm, one in row.items():
                low, high = one["ci95"]
                assert f"| {budget} | `{arm}` | {one['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in page


def test_a_sum_counts_the_same_however_many_problems_it_has():
    def asking(a, b, answer):
        return {"prompt": [{"content": f"Ann has {a} and gets {b}"}], "answer": answer}

    problems = [asking(1, 2, "3"), asking(2, 1, "3"), asking(2, 1, "3"), asking(2, 2, "4")]
    scores = {f"test/labels8/{arm}": np.zeros((1, 4)) for arm in ("base", "direct_grpo", "bridge")}
    scores["test/labels8/bridge"][0] = 0.5, 0.75, 1.0, 0.25  # 0.75 and 0.25 by sum
    table = real_model.by_sum(scores | {"test/bridge": np.ones((1, 4))}, problems)
    assert table.splitlines()[2:] == ["| 8 | direct_grpo < bridge | +0.500 | +0.250 to +0.750 | holds |"]


@pytest.mark.slow
def test_the_first_gpu_s_parts_run_and_are_not_run_again(tmp_path):
    """With tiny models: each script with the hf sampler, what it used beside its plan."""
    command = [sys.executable, ROOT / "benchmarks" / "first_gpu.py", "--out", tmp_path, "--dry-run"]
    command += ["--only", "machine|kernels|_hf|real_model"]
    for again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 and ("opd_hf ..." in done.stdout) != again, done.stdout + done.stderr
    results = json.loads((tmp_path / "first_gpu.json").read_text())
    assert len(results) == 7 and not any("error" in result for result in results.values())
    for name in ("opd_hf", "grpo_hf", "fkl_warmup_hf"):
        one = results[name]
        assert one["finite"] and one["train_tflops"] > 0 and one["planned_gb"] == pytest.approx(one["used_gb"], rel=0.3)
    assert "| opd_hf |" in (tmp_path / "first_gpu.md").read_text()
