"""A reward of one's own: any function of the response, with labels or without."""

import json

import pytest
from conftest import read_jsonl, write_jsonl
from test_ledger import grpo

import eval_math
from infra.cli import UsageError
from infra.dataset import Problem
from infra.reward import OwnReward, make_grader

BREVITY = """
def brevity(response):
    return 1 / (1 + len(response))

def matches(response, answer):
    return float(answer in response)

def everything(problem, response, answer):
    return len(problem) + len(answer) / 10

def wrong(response):
    return "good"

def odd(response, weight):
    return 1.0

constant = 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(BREVITY)
    return str(path)


def test_a_function_gets_what_it_names(own):
    problems = [Problem("1+1?", (), "2"), Problem("10+1?", (), "11")]
    assert OwnReward(f"{own}:brevity").grade(["abc", ""], problems) == [0.25, 1.0]
    assert OwnReward(f"{own}:matches").grade(["it is 2", "12"], problems) == [1.0, 0.0]
    assert OwnReward(f"{own}:everything").grade(["", ""], problems) == [4.1, 5.2]
    assert not OwnReward(f"{own}:brevity").uses_labels and OwnReward(f"{own}:matches").uses_labels
    assert make_grader("math").uses_labels


def test_grading_again_gives_a_reward_the_problem_without_its_key(own, run_script, checkpoints, tmp_path):
    """The key of a problem behind a system prompt has a digest of that at its end."""
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": chat, "answer": "2"}, {"prompt": "2+2?", "answer": "4"}])
    few = {"samples": 2, "max_response_tokens": 4, "grader": f"{own}:everything"}
    run = run_script("eval_math", model=checkpoints.student, benchmarks=(data,), **few)
    first = read_jsonl(run.out / "chat/generations.jsonl")
    assert "[after " in first[0]["problem"] and [row["reward"] for row in first] == [4.1] * 4
    eval_math.main(eval_math.Args(regrade=str(run.out), grader=f"{own}:everything"))
    assert read_jsonl(run.out / "chat/generations.jsonl") == first


@pytest.mark.parametrize("spec, message", [
    ("nonsense", "choose math, boxed, or FILE.py:FUNCTION"),
    ("missing.py:f", "there is no file missing.py"),
    ("OWN:nothing", "has no function nothing"),
    ("OWN:constant", "has no function constant"),
    ("OWN:odd", "may take response, problem, answer, not weight"),
])  # fmt: skip
def test_what_is_no_reward_is_refused(own, spec, message):
    with pytest.raises(UsageError, match=message):
        make_grader(spec.replace("OWN", own))


def test_a_file_that_does_not_load_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(UsageError, match="broken.py cannot be loaded .ModuleNotFoundError"):
        make_grader(f"{tmp_path}/broken.py:f")


def test_a_reward_that_is_no_number_ends_with_the_response(own):
    with pytest.raises(UsageError, match="gave 'good' for the response 'abc'"):
        OwnReward(f"{own}:wrong").grade(["abc"], [Problem("1?", (), None)])


def test_without_labels_no_answer_is_needed_and_none_is_booked(run_script, checkpoints, own, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", [{"problem": f"{i}+{i}?"} for i in range(6)])
    run = run_script("grpo", **grpo(checkpoints, data, grader=f"{own}:brevity", eval_data=data, eval_every=2))
    assert run.record["finished"] and json.loads((run.out / "labels.json").read_text()) == []
    rewards = [row["charts/reward"] for row in run.metrics if "charts/reward" in row]
    assert rewards and all(0 < reward < 1 for reward in rewards) and run.updates
    assert all(row["charts/labels_used"] == 0 for row in run.metrics if "charts/reward" in row)


def test_with_labels_the_ledger_knows(run_script, checkpoints, data, own):
    run = run_script("grpo", **grpo(checkpoints, data, grader=f"{own}:matches"))
    assert run.record["labels_used"] == 8


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_it_marks_the_learning_curve_and_the_samples_of_a_dense_stage(run_script, checkpoints, own, tmp_path, script):
    data = write_jsonl(tmp_path / "x.jsonl", [{"problem": f"{i}+{i}?"} for i in range(4)])
    flags = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "max_response_tokens": 4}
    flags |= {"prompts_per_step": 4} if script == "opd" else {"rollouts_per_step": 4}
    run = run_script(script, **flags, max_steps=1, eval_data=data, eval_every=1, grader=f"{own}:brevity")
    assert [0 < row["eval/accuracy"] < 1 for row in run.metrics] == [True, True]
    assert all(0 < row["reward"] < 1 for row in read_jsonl(run.out / "samples.jsonl"))


def test_eval_math_measures_it_and_grades_again(run_script, checkpoints, own, tmp_path, cli):
    data = write_jsonl(tmp_path / "x.jsonl", [{"problem": f"{i}+{i}?"} for i in range(4)])
    flags = {"model": checkpoints.student, "benchmarks": (data,), "samples": 2, "max_response_tokens": 4}
    run = run_script("eval_math", **flags, grader=f"{own}:brevity")
    summary = json.loads((run.out / "x/summary.json").read_text())
    assert 0 < summary["accuracy"] < 1 and summary["pass_at_k"] is None and summary["problems"] == 4
    code, out, _ = cli("eval_math", "--regrade", run.out, "--grader", f"{own}:brevity")
    assert code == 0 and "0 of 8 verdicts have changed" in out


def test_references_that_cannot_be_graded_are_counted_and_named(run_script, checkpoints, tmp_path, capsys):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "why?", "answer": "because the light is bent, as one may see"}]
    data = write_jsonl(tmp_path / "x.jsonl", [*rows, {"problem": "2+2?", "answer": "4"}])
    run_script("grpo", **grpo(checkpoints, data, prompts_per_step=2, minibatch_prompts=2, max_steps=1))
    assert "cannot read 1 of 3 reference answers" in (out := capsys.readouterr().out) and "because the light" in out
