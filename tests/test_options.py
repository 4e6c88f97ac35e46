"""The options of docs/options.md: each one's gradient against the formula written out in float64, its independence of the
micro-batch split and of the ranks, what it counts and logs, and what a user may get wrong."""

import json

import pytest
import torch
from conftest import FakeGrader, load, write_jsonl
from test_bad_input import assert_refused, typed  # noqa: F401  (a fixture)
from test_parallel import SMALL, TIMES, difference, torchrun
from test_scripts import (
    OPD,
    WARMUP,
    assert_close,
    assert_unchanged,
    budget_for,
    gradient_of,
    kl,
    model_at,
    naive_divergences,
    token_loss,
)

import dataset
import toy


def reward(answer, _=None):
    return float(int(answer[1:]) % 3 > 0)  # p0, p3, p6 and p9 are wrong


def pass_rate(answer):
    return int(answer[1:]) % 5 / 4  # 0 for p0, p5 and p10, 1 for p4 and p9


def write_generations(path, problems, rate=pass_rate):
    """What eval_math.py would write: four responses to each problem."""
    return write_jsonl(
        path, [{"problem": p.text, "reward": float(j < 4 * rate(p.answer))} for p in problems for j in range(4)]
    )


@pytest.fixture
def problems(data):
    return dataset.load_problems(data, "--x", True)


@pytest.fixture
def generations(tmp_path, problems):
    return write_generations(tmp_path / "generations.jsonl", problems)


def with_file(flags, generations):
    return flags | {"paced": generations} if flags.get("paced") else flags


def expected_weights(flags, answers, entropies, divergences):
    """One token at a time: the weights that the loss divides by their sum."""
    weights = []
    for answer, entropy in zip(answers, entropies, strict=True):
        p, r, w = pass_rate(answer), reward(answer), flags.get("reward_weight", 0)
        weights += len(entropy) * [(p * (1 - p) if flags.get("paced") else 1) * (1 - w + w * r)]
    if "tip_fraction" in flags:
        a, b = (
            (x - x.min()) / (x.max() - x.min()) for x in (torch.cat(column).detach() for column in (entropies, divergences))
        )
        score = a + b - a * b
        threshold = score.sort(descending=True).values[round(flags["tip_fraction"] * len(score)) - 1]
        weights = [weight * bool(s >= threshold) for weight, s in zip(weights, score, strict=True)]
    return torch.tensor(weights, dtype=torch.float64)


def naive(student, teacher, rollout, problems, flags):
    """-> loss, weights (tokens,), reverse KL (tokens,)"""
    tokenizer, temperature = toy.make_tokenizer(), flags.get("temperature", 1.0)
    answers = {tuple(dataset.render_prompt(tokenizer, p, "", False)): p.answer for p in problems}
    losses, entropies, divergences = [], [], []
    for log_ps, log_pt, ids in naive_divergences(student, teacher, rollout, rollout[0], temperature):
        name = flags.get("loss", "reverse_kl")
        losses.append(log_ps.gather(1, ids)[:, 0] if name == "reward_free" else token_loss(name, log_ps, log_pt, ids))
        entropies.append(-(log_ps.exp() * log_ps).sum(-1))
        divergences.append(kl(log_ps, log_pt))
    weights = expected_weights(flags, [answers[tuple(prompt)] for prompt in rollout[0]], entropies, divergences)
    return (weights * torch.cat(losses)).sum() / weights.sum(), weights, torch.cat(divergences).detach()


ALL_AT_ONCE = {"tip_fraction": 0.5, "paced": True, "reward_weight": 0.6, "temperature": 0.7}
FLAGS = [
    {"tip_fraction": 0.3},
    {"tip_fraction": 0.05, "temperature": 0.7},
    {"paced": True},
    {"reward_weight": 0.7},
    {"reward_weight": 1.0, "loss": "forward_kl"},
    {"loss": "reward_free"},
    ALL_AT_ONCE,
    ALL_AT_ONCE | {"loss": "sampled"},
]


def name_of(flags):
    return " ".join(f"{name}={value}" for name, value in flags.items())


@pytest.mark.parametrize("teacher", ["wide", "narrow"])  # its logits are cached, its hidden states are
@pytest.mark.parametrize("flags", FLAGS, ids=name_of)
def test_opd_gradient_equals_the_formula(run_script, fake_grader, checkpoints, data, problems, generations, teacher, flags):
    fake_grader(reward)
    models = {"teacher": getattr(checkpoints, teacher), "student": checkpoints.student}
    run = run_script("opd", **models, train_data=data, **OPD, **with_file(flags, generations))
    [rollout], [(params, actual)], [logged] = run.samples, run.updates, run.metrics
    student = model_at(checkpoints.student, params)
    loss, weights, reverse_kl = naive(student, load(models["teacher"]), rollout, problems, flags)
    assert_close(actual, gradient_of(student, loss))
    assert logged["losses/policy_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6), "a mean over all tokens"
    assert logged["charts/trained_frac"] == pytest.approx(float((weights > 0).double().mean()))
    assert logged["debug/sampler_logprob_diff_max"] < 1e-4


@pytest.mark.parametrize("loss, reward_weight", [("forward_kl", 0.7), ("forward_kl", 1.0), ("ce", 0.7)])
def test_warmup_gradient_equals_the_formula(
    run_script, fake_grader, checkpoints, data, problems, generations, loss, reward_weight
):
    fake_grader(reward)
    flags = {"loss": loss, "reward_weight": reward_weight, "paced": True}
    models = {"teacher": checkpoints.wide, "student": checkpoints.student}
    run = run_script("fkl_warmup", **models, train_data=data, **WARMUP, **with_file(flags, generations))
    [(prompts, n, responses)], [(params, actual)], [logged] = run.samples, run.updates, run.metrics
    rollout = [prompt for prompt in prompts for _ in range(n)], 1, responses
    student = model_at(checkpoints.student, params)
    expected, weights, reverse_kl = naive(student, load(checkpoints.wide), rollout, problems, flags)
    assert_close(actual, gradient_of(student, expected))
    assert logged["losses/policy_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6)
    assert logged["charts/trained_frac"] == pytest.approx(float((weights > 0).double().mean()))
    assert logged["charts/labels_used"] == run.record["labels_used"] == 12


@pytest.mark.parametrize("flags", [FLAGS[0], ALL_AT_ONCE, {"loss": "reward_free"}], ids=name_of)
def test_opd_gradient_does_not_depend_on_the_micro_batches(run_script, fake_grader, checkpoints, data, generations, flags):
    fake_grader(reward)
    args = OPD | {"teacher": checkpoints.narrow, "student": checkpoints.student, "train_data": data}
    args |= with_file(flags, generations)
    whole = run_script("opd", **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):
        split = run_script("opd", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])
        for key in ("losses/policy_loss", "losses/reverse_kl", "charts/trained_frac"):
            assert split.metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-6, abs=1e-9), key


def test_warmup_gradient_does_not_depend_on_the_micro_batches(run_script, fake_grader, checkpoints, data, generations):
    fake_grader(reward)
    args = WARMUP | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data}
    args |= {"paced": generations, "reward_weight": 0.7}
    whole = run_script("fkl_warmup", **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):
        split = run_script("fkl_warmup", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_equal_weights_are_no_weights(run_script, fake_grader, checkpoints, data, problems, tmp_path, script):
    """Every problem passed half of the time, every response right: nothing but the sum of the weights has changed."""
    fake_grader(lambda answer, j: 1.0)
    even = write_generations(tmp_path / "even.jsonl", problems, lambda answer: 0.5)
    args = (OPD if script == "opd" else WARMUP) | {"teacher": checkpoints.wide, "student": checkpoints.student}
    plain = run_script(script, train_data=data, **args)
    weighted = run_script(script, train_data=data, **args, paced=even, reward_weight=0.5)
    assert_close(weighted.updates[0][1], plain.updates[0][1], 1e-12)
    [row] = plain.metrics
    assert row["charts/trained_frac"] == 1 and not {"charts/labels_used", "charts/reward"} & row.keys()
    assert plain.record["labels_used"] == 0


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_a_step_of_wrong_responses_changes_nothing(run_script, fake_grader, checkpoints, data, script):
    """With --reward-weight 1 all weights of such a step are 0. It comes behind one that fills AdamW's moments."""
    calls = []
    fake_grader(lambda answer, j: float(calls.append(answer) or len(calls) <= 12))
    args = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "max_response_tokens": 8}
    args |= {"prompts_per_step" if script == "opd" else "rollouts_per_step": 12, "learning_rate": 0.1, "sample_every": 0}
    one = run_script(script, **args, reward_weight=1.0, max_steps=1)
    calls.clear()
    two = run_script(script, **args, reward_weight=1.0, max_steps=2)
    assert [row["charts/reward"] for row in two.metrics] == [1, 0]
    assert two.metrics[1]["losses/grad_norm"] == two.metrics[1]["losses/policy_loss"] == 0
    assert two.metrics[1]["losses/reverse_kl"] > 0, "it is still measured"
    assert two.record["updates"] == one.record["updates"] == 1, "and is no update"
    assert_unchanged(two.out, one.out)


def test_labels_are_counted(run_script, fake_grader, checkpoints, data, generations):
    fake_grader(reward)
    args = OPD | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "prompts_per_step": 5}
    args |= {"max_steps": 2, "sample_every": 0}
    weighted = run_script("opd", **args, reward_weight=0.5)
    assert [row["charts/labels_used"] for row in weighted.metrics] == [5, 10] and weighted.record["labels_used"] == 10
    assert 0 < sum(row["charts/reward"] for row in weighted.metrics) < 2
    paced = run_script("opd", **args, paced=generations)
    assert [row["charts/labels_used"] for row in paced.metrics] == [12, 12] and paced.record["labels_used"] == 12
    assert run_script("opd", **args, tip_fraction=0.5).record["labels_used"] == 0


@pytest.mark.slow
def test_ranks_give_the_single_process_weights(run_script, fake_grader, checkpoints, data, generations, tmp_path):
    fake_grader(FakeGrader.rule)
    distil = SMALL | {"student": checkpoints.llama, "teacher": checkpoints.narrow, "train_data": data, "paced": generations}
    flags = {
        "tip": ("opd", {"prompts_per_step": 7, "tip_fraction": 0.4}),
        "one": ("opd", {"prompts_per_step": 1, "tip_fraction": 0.4, "paced": None, "loss": "sampled"}),
        "warmup": ("fkl_warmup", {"rollouts_per_step": 5, "rollouts_per_prompt": 2, "reward_weight": 0.7}),
    }

    def jobs(folder):
        return [[script, distil | own | {"out": f"{tmp_path}/{folder}/{name}"}] for name, (script, own) in flags.items()]

    ranked = torchrun(2, "tests/parallel_ranks.py", json.dumps(jobs("ranked")))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for script, args in jobs("single"):
        single = run_script(script, **args)
        out = tmp_path / "ranked" / single.out.name
        assert difference(single.out, out) < 1e-5, single.out.name
        theirs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for mine, other in zip(single.metrics, theirs, strict=True):
            for key in mine:
                if not key.startswith(TIMES):
                    assert other[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-5), (single.out.name, key)


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("script, name, value", [
    ("opd", "tip_fraction", 0), ("opd", "tip_fraction", 1.5), ("opd", "reward_weight", -0.1), ("opd", "reward_weight", 2),
    ("fkl_warmup", "reward_weight", -0.1), ("fkl_warmup", "reward_weight", 2),
])  # fmt: skip
def test_an_impossible_value_names_its_flag(cli, typed, script, name, value):  # noqa: F811
    assert_refused(cli(script, *typed(script, **{name: value})), "--" + name.replace("_", "-"))


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_rewards_need_answers(cli, typed, problems, tmp_path, script):  # noqa: F811
    unlabeled = write_jsonl(tmp_path / "unlabeled.jsonl", [{"problem": p.text} for p in problems])
    result = cli(script, *typed(script, train_data=unlabeled, reward_weight=0.5))
    assert_refused(result, "--train-data", "needs a column answer")


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_a_file_that_gives_no_weights(cli, typed, problems, tmp_path, script):  # noqa: F811
    path = tmp_path / "generations.jsonl"
    assert_refused(cli(script, *typed(script, paced=tmp_path / "none.jsonl")), "--paced", "Check the path")
    write_jsonl(path, [{"problem": p.text} for p in problems])
    assert_refused(cli(script, *typed(script, paced=path)), "--paced", "needs problem and reward", "eval_math.py")
    write_generations(path, problems[:-2])
    assert_refused(cli(script, *typed(script, paced=path)), "--paced", "lacks 2 of the 12 problems", "eval_math.py")
    write_generations(path, problems, lambda answer: reward(answer))
    assert_refused(cli(script, *typed(script, paced=path)), "--paced", "always or never", "raise eval_math.py's --samples")
