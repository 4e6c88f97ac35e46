"""The three trainers: gradients against the formula written out naively in float64 with transformers' own logits, their
independence of the micro-batch split, determinism, and what each flag changes."""

import contextlib
import itertools
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, next_token_logits, random_model, read_jsonl, write_jsonl

import common
import toy
from infra import batches, dataset, models, sampler_hf, samples_page
from infra.prompts import render_prompt

MIXED = {"p0": 1, "p1": 2, "p2": 3, "p4": 1, "p5": 2, "p7": 3, "p8": 1, "p9": 2, "p10": 3}  # right answers of 4; else 0 or 4


def mixed_rule(answer, j):
    return float(j < MIXED.get(answer, 4 if answer == "p3" else 0))


def assert_close(actual: dict, expected: dict, tolerance: float = 1e-6):
    """Each tensor equals its namesake, relative to the norm of the whole gradient."""
    assert actual.keys() == expected.keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > 0
    worst = max(float((actual[name] - expected[name]).norm() / norm) for name in expected)
    assert worst < tolerance, f"relative gradient difference {worst:.1e}"


def budget_for(lengths: list[int], count: int) -> int:
    """A --micro-batch-tokens that splits `lengths` into exactly `count` micro-batches."""
    fitting = [budget for budget in range(1, 2000) if len(batches.micro_batches(lengths, budget)) == count]
    assert fitting, f"no budget gives {count} micro-batches of {lengths}"
    return fitting[0]


def gradient_of(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def model_at(folder, params):
    model = load(folder)
    model.load_state_dict(params, strict=False)
    return model.requires_grad_(True)


@pytest.fixture
def disagreeing_sampler(monkeypatch):
    """What the scripts take for vllm: hf's responses, with log-probabilities that are not the trainer's."""
    sample, make_sampler = sampler_hf.HFSampler.sample, common.make_sampler

    def disagree(self, *args, **options):
        noise = torch.Generator().manual_seed(0)
        for response in (responses := sample(self, *args, **options)):
            for t in range(len(response.ids)):
                response.sampler_logprobs[t] += 0.7 * float(torch.randn((), generator=noise))
        return responses

    monkeypatch.setattr(sampler_hf.HFSampler, "sample", disagree)
    monkeypatch.setattr(common, "choose_sampler", lambda args: None)
    monkeypatch.setattr(common, "make_sampler", lambda args, *a, **kw: make_sampler(replace(args, sampler="hf"), *a, **kw))


def importance_weights(logprobs, response, cap):  # (R,), Response -> (R,)
    """min(trainer's / sampler's probability, cap); cap 0: none."""
    ratio = (logprobs.detach() - torch.tensor(response.sampler_logprobs, dtype=torch.float64)).exp()
    return ratio.clamp(max=cap) if cap else torch.ones_like(ratio)


# --------------------------------------------------------------------------------------------------------------- GRPO
GRPO = dict(
    prompts_per_step=10,
    minibatch_prompts=5,
    group_size=4,
    max_response_tokens=20,
    max_steps=1,
    dtype="float64",
    learning_rate=0.02,
)


def naive_grpo(folder, rollout, rewards, args, updates, minibatch_prompts):
    """[gradient, ...] of every minibatch, and counts of what was clipped: the formula, one row and one token at a time."""
    prompts, n, responses = rollout
    counts, gradients = Counter(), []
    initial = load(folder)
    temperature = args.get("temperature", 1.0)
    for start in range(0, len(prompts), minibatch_prompts):
        groups = range(start, start + minibatch_prompts)
        rows = [(p, j) for p in groups for j in range(n)]
        if args.get("overlong_filtering"):
            rows = [(p, j) for p, j in rows if not responses[p * n + j].truncated]
        tokens = sum(len(responses[p * n + j].ids) for p, j in rows)
        params, _ = updates[len(gradients)]
        model, loss = model_at(folder, params), 0.0
        for p, j in rows:
            group = torch.tensor(rewards[p * n : p * n + n], dtype=torch.float64)
            advantage = group[j] - group.mean()
            if args.get("std_normalization", True):
                advantage = advantage / (group.std() + 1e-6)
            response = responses[p * n + j].ids
            ids = torch.tensor(response)[:, None]
            log_p = torch.log_softmax(next_token_logits(model, prompts[p], response) / temperature, -1)  # (R, V)
            with torch.no_grad():
                ref_log_p = torch.log_softmax(next_token_logits(initial, prompts[p], response) / temperature, -1)
            ratio = (log_p.gather(1, ids) - ref_log_p.gather(1, ids))[:, 0].exp()
            weights = importance_weights(ref_log_p.gather(1, ids)[:, 0], responses[p * n + j], args.get("tis_cap", 0))
            for r, weight in zip(ratio, weights, strict=True):
                objective = torch.min(r * advantage, r.clamp(1 - 0.2, 1 + 0.28) * advantage)
                counts["changed"] += int((r - 1).abs() > 0.01)
                counts["clipped"] += int(r * advantage > objective)
                if advantage < 0 and objective < args.get("dual_clip", 10.0) * advantage:
                    objective = args.get("dual_clip", 10.0) * advantage
                    counts["dual"] += 1
                loss = loss - weight * objective / tokens
                counts["weighted"] += int(weight < 1)
                counts["capped"] += int(weight == args.get("tis_cap"))
            reverse_kl = (log_p.exp() * (log_p - ref_log_p)).sum(-1)  # (R,)
            loss = loss + args.get("kl_coef", 0.0) * reverse_kl.sum() / tokens
        gradients.append(gradient_of(model, loss))
    return gradients, counts


def rewards_of(rule, data, rollout, tokenizer):
    """The rewards that the fake grader gave, in the order of the rollout."""
    answers = {
        tuple(render_prompt(tokenizer, p, "", False)): p.answer for p in dataset.load_problems(data, "--x", True)
    }
    prompts, n, _ = rollout
    return [rule(answers[tuple(prompt)], j) for prompt in prompts for j in range(n)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kl_coef": 0.3, "temperature": 0.7},
        {"std_normalization": False, "overlong_filtering": True},
        {"dual_clip": 1.05},
    ],
    ids=["default", "kl_temperature", "no_std_overlong", "dual_clip"],
)
def test_grpo_gradients_equal_the_formula(run_script, fake_grader, checkpoints, data, flags):
    """Two minibatches: at ratio 1, and behind an update. Groups with equal rewards are left out by the script, not here."""
    fake_grader(mixed_rule)
    run = run_script("grpo", model=checkpoints.student, train_data=data, **GRPO, **flags)
    [rollout] = run.samples
    rewards = rewards_of(mixed_rule, data, rollout, toy.make_tokenizer())
    truncated = [r.truncated for r in rollout[2]]
    assert any(truncated) and not all(truncated) and len(run.updates) == 2
    expected, counts = naive_grpo(checkpoints.student, rollout, rewards, flags, run.updates, 5)
    for (_, actual), gradient in zip(run.updates, expected, strict=True):
        assert_close(actual, gradient)
    assert counts["changed"] > 20 and counts["clipped"] > 0, "the second minibatch should see a changed policy"
    assert counts["dual"] > 0 or "dual_clip" not in flags


@pytest.mark.parametrize("tis_cap", [2.0, 0.0])
def test_grpo_weights_tokens_of_another_sampler(run_script, fake_grader, checkpoints, data, disagreeing_sampler, tis_cap):
    fake_grader(mixed_rule)
    flags = {"tis_cap": tis_cap, "dual_clip": 1.05}
    run = run_script("grpo", model=checkpoints.student, train_data=data, sampler="vllm", **GRPO, **flags)
    [rollout] = run.samples
    rewards = rewards_of(mixed_rule, data, rollout, toy.make_tokenizer())
    expected, counts = naive_grpo(checkpoints.student, rollout, rewards, flags, run.updates, 5)
    for (_, actual), gradient in zip(run.updates, expected, strict=True):
        assert_close(actual, gradient)
    assert (counts["weighted"] > 20 and counts["capped"] > 20) == bool(tis_cap)
    assert (run.metrics[0]["debug/sampler_ratio_clipfrac"] > 0.05) == bool(tis_cap)
    assert run.metrics[0]["debug/sampler_logprob_diff_mean"] > 0.3


@pytest.mark.parametrize("script", ["grpo", "opd", "fkl_warmup"])
def test_ids_beyond_the_tokenizer_are_left_out_and_counted(run_script, fake_grader, tmp_path, checkpoints, data, script):
    """A head with so many padding rows that some responses begin with one and are empty; the teacher has none."""
    fake_grader(mixed_rule)
    random_model(seed=5, vocab_size=64).save_pretrained(tmp_path / "padded")
    toy.make_tokenizer().save_pretrained(tmp_path / "padded")
    padded, few = str(tmp_path / "padded"), {"max_response_tokens": 20, "max_steps": 1, "micro_batch_tokens": 1}
    models = {
        "grpo": {"model": padded, "prompts_per_step": 10, "minibatch_prompts": 5, "group_size": 4},
        "opd": {"teacher": checkpoints.narrow, "student": padded, "prompts_per_step": 12},
        "fkl_warmup": {"teacher": padded, "student": checkpoints.student, "rollouts_per_step": 4},
    }[script]
    run = run_script(script, train_data=data, **models, **few)
    [(_, _, responses)] = run.samples
    assert any(r.out_of_vocab and r.ids for r in responses) and any(not r.ids for r in responses)
    assert all(math.isfinite(value) for value in run.metrics[0].values()) and run.metrics[0]["losses/grad_norm"] > 0
    trained = [ids for _, batch in run.passes for ids in batch]
    assert trained and all(ids and max(ids) < len(toy.ID) for ids in trained)
    if script != "fkl_warmup":
        assert run.metrics[0]["debug/out_of_vocab"] == sum(r.out_of_vocab for r in responses)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_grpo_gradients_do_not_depend_on_the_micro_batches(run_script, fake_grader, checkpoints, data, kl_coef):
    fake_grader(mixed_rule)
    args = GRPO | {"model": checkpoints.student, "train_data": data, "kl_coef": kl_coef}
    whole = run_script("grpo", **args, micro_batch_tokens=10**6)
    per_minibatch = [lengths for lengths, _ in whole.splits]
    assert len(per_minibatch) == 2
    for minibatch, count in itertools.product((0, 1), (1, 2, 7)):
        split = run_script("grpo", **args, micro_batch_tokens=budget_for(per_minibatch[minibatch], count))
        assert len(split.splits[minibatch][1]) == count
        for (_, actual), (_, expected) in zip(split.updates, whole.updates, strict=True):
            assert_close(actual, expected)
        assert ("losses/ref_kl" in whole.metrics[0]) == ("losses/ref_kl" in split.metrics[0]) == (kl_coef > 0)
        keys = ["losses/policy_loss", "losses/approx_kl", "losses/entropy", "losses/clipfrac"]
        for key in [*keys, "losses/ref_kl"] if kl_coef else keys:
            assert split.metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-6, abs=1e-12), key


def test_grpo_learns_from_the_real_grader(run_script, world):
    run = run_script(
        "grpo",
        model=str(world / "teacher_base"),
        train_data=str(world / "train.jsonl"),
        prompts_per_step=10,
        minibatch_prompts=10,
        group_size=8,
        max_response_tokens=24,
        max_steps=2,
        eval_data=str(world / "test.jsonl"),
        eval_every=1,
    )
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert 0 < run.metrics[1]["charts/reward"] < 1 and run.metrics[1]["losses/grad_norm"] > 0
    assert all(0 <= row["eval/accuracy"] <= 1 for row in run.metrics)
    assert run.metrics[2]["debug/sampler_logprob_diff_max"] < 1e-4


def weights(folder):
    return load(folder, torch.float32).state_dict()


def assert_unchanged(out, folder):
    before, after = weights(folder), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("flags", [{}, {"dynamic_sampling": 2}], ids=["plain", "dynamic_sampling"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_grpo_step_with_equal_rewards_changes_nothing(run_script, fake_grader, checkpoints, data, flags, reward):
    fake_grader(lambda answer, j: reward)
    run = run_script(
        "grpo",
        model=checkpoints.student,
        train_data=data,
        prompts_per_step=4,
        minibatch_prompts=2,
        group_size=2,
        max_response_tokens=8,
        max_steps=2,
        learning_rate=0.1,
        **flags,
    )
    assert_unchanged(run.out, checkpoints.student)
    assert len(run.metrics) == 2 and run.updates == []
    for row in run.metrics:
        assert row["charts/zero_std_frac"] == 1 and row["charts/reward"] == reward
        assert row["losses/grad_norm"] == 0 and "losses/policy_loss" not in row, "no row has a loss to average"


@pytest.fixture
def advantages_of(run_script, fake_grader, checkpoints, tmp_path, monkeypatch):
    """`advantages_of(groups)`: what grpo.py makes of these rewards, a list for each problem. (P, G); its run."""

    def start(groups: list[list[float]], **flags):
        fake_grader(lambda answer, j: groups[int(answer)][j])
        data = write_jsonl(tmp_path / "groups.jsonl", [{"problem": f"{k}?", "answer": str(k)} for k in range(len(groups))])
        written = []

        def write(self, step, problems, responses, grader=None, rewards=None, advantages=None):
            written.append(([int(p.answer) for p in problems], advantages))

        monkeypatch.setattr(samples_page.Samples, "write", write)
        sizes = {"prompts_per_step": len(groups), "minibatch_prompts": len(groups), "group_size": len(groups[0])}
        limits = {"max_response_tokens": 1, "max_steps": 1}
        run = run_script("grpo", model=checkpoints.student, train_data=data, **sizes, **limits, **flags)
        [(answers, advantages)] = written
        order = torch.tensor(answers).view(len(groups), -1)[:, 0]  # the step takes the problems in an order of its own
        return advantages.view(len(groups), -1)[order.argsort()], run

    return start


@pytest.mark.parametrize("std_normalization", [True, False])
@pytest.mark.parametrize("G", [3, 7, 8])
def test_grpo_equal_rewards_of_any_value_are_no_signal(advantages_of, checkpoints, G, std_normalization):
    """A mean of equal rewards may differ from them by its rounding, which a deviation of the same size would blow up."""
    values = [0.1, 1.2, 1 / 3, -0.7, 1e6 + 0.1]
    naive = torch.tensor([[value] * G for value in values])
    assert (naive - naive.mean(dim=1, keepdim=True)).any() or G == 8
    advantages, run = advantages_of([[value] * G for value in values], std_normalization=std_normalization)
    assert not advantages.any() and run.updates == [] and run.record["updates"] == 0
    assert run.metrics[0]["charts/zero_std_frac"] == 1
    assert_unchanged(run.out, checkpoints.student)


@pytest.mark.parametrize("G, std_normalization", [*((G, True) for G in range(2, 17)), (3, False), (8, False), (15, False)])
def test_grpo_advantages_of_right_and_wrong_equal_the_formula(advantages_of, G, std_normalization):
    """(r - mean) / (std + 1e-6) in float32: to the bit where float32 holds k / G exactly. Elsewhere the formula rounds the
    mean before it subtracts, and grpo.py is the exact difference, rounded once."""
    groups = [[float(j < k) for j in range(G)] for k in range(G + 1)]
    groups += [group[::-1] for group in groups]  # the first response wrong, then right
    rewards = torch.tensor(groups)
    expected = rewards - rewards.mean(dim=1, keepdim=True)
    if std_normalization:
        expected = expected / (rewards.std(dim=1, keepdim=True) + 1e-6)
    advantages, _ = advantages_of(groups, std_normalization=std_normalization)
    assert advantages.dtype == torch.float32
    if G in (2, 4, 8, 16):
        assert torch.equal(advantages, expected)
    else:
        assert ((advantages - expected).abs() <= 3 * torch.finfo(torch.float32).eps * expected.abs()).all()
        exact = torch.tensor([[float(Fraction(int(r)) - Fraction(int(sum(g)), G)) for r in g] for g in groups])
        assert std_normalization or torch.equal(advantages, exact)


def test_grpo_log_ratios_beyond_what_exp_can_hold_are_clamped_and_counted(run_script, fake_grader, checkpoints, data):
    """The first minibatch throws the policy far away; at a log-ratio of 89 the second one's gradient was nan."""
    fake_grader(lambda answer, j: float(j % 2))
    flags = {"prompts_per_step": 10, "minibatch_prompts": 5, "group_size": 4, "max_response_tokens": 12, "max_steps": 1}
    run = run_script("grpo", model=checkpoints.student, train_data=data, learning_rate=30.0, **flags)
    [row] = run.metrics
    assert row["debug/logratio_max"] > 89 and 0 < row["debug/logratio_clampfrac"] < 1
    assert all(np.isfinite(value) for value in row.values())
    assert all(tensor.isfinite().all() for tensor in load(run.out).state_dict().values())


def test_grpo_overlong_filtering_of_every_response_changes_nothing(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    run = run_script(
        "grpo",
        model=checkpoints.student,
        train_data=data,
        prompts_per_step=4,
        minibatch_prompts=4,
        group_size=4,
        max_response_tokens=1,
        max_steps=1,
        overlong_filtering=True,
        seed=2,
        learning_rate=0.1,
    )
    assert all(r.truncated for r in run.samples[0][2])
    assert_unchanged(run.out, checkpoints.student)


def test_grpo_dynamic_sampling_replaces_groups_with_equal_rewards(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    run = run_script(
        "grpo",
        model=checkpoints.student,
        train_data=data,
        prompts_per_step=6,
        minibatch_prompts=6,
        group_size=4,
        max_response_tokens=8,
        max_steps=1,
        dynamic_sampling=3,
    )
    tokenizer = toy.make_tokenizer()
    answers = {
        tuple(render_prompt(tokenizer, p, "", False)): p.answer for p in dataset.load_problems(data, "--x", True)
    }
    first_draw = [answers[tuple(prompt)] for prompt in run.samples[0][0]]
    assert any(a not in MIXED for a in first_draw) and len(run.samples) == 2, "the seed should need one more draw"
    trained = [answers[tuple(prompt)] for prompts, _ in run.passes for prompt in prompts]
    assert set(trained) <= set(MIXED) and len(trained) == 6 * 4
    assert set(first_draw) & set(MIXED) <= set(trained), "what the first draw gave is kept"
    assert run.metrics[0]["charts/labels_used"] == len({tuple(p) for prompts, _, _ in run.samples for p in prompts})
    drawn = [answers[tuple(prompt)] for prompts, _, _ in run.samples for prompt in prompts]
    assert run.metrics[0]["charts/zero_std_frac"] == pytest.approx(sum(a not in MIXED for a in drawn) / len(drawn))


def test_grpo_counts_distinct_labels(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    run = run_script(
        "grpo",
        model=checkpoints.student,
        train_data=data,
        prompts_per_step=8,
        minibatch_prompts=4,
        group_size=2,
        max_response_tokens=4,
        max_steps=3,
    )
    assert [row["charts/labels_used"] for row in run.metrics] == [8, 12, 12] and run.record["labels_used"] == 12


def test_grpo_epochs_see_every_problem_equally_often(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    run = run_script(
        "grpo",
        model=checkpoints.student,
        train_data=data,
        prompts_per_step=6,
        minibatch_prompts=6,
        group_size=2,
        max_response_tokens=2,
        epochs=2,
    )
    seen = Counter(tuple(prompt) for prompts, _, _ in run.samples for prompt in prompts)
    assert len(run.metrics) == 4 and set(seen.values()) == {2} and len(seen) == 12


# ------------------------------------------------------------------------------------------------------- distillation
def naive_divergences(student, teacher, rollout, teacher_prompts, temperature):
    """Per response: student's and teacher's log-softmax (R, V), the sampled ids (R, 1)."""
    prompts, n, responses = rollout
    assert n == 1
    for prompt, teacher_prompt, response in zip(prompts, teacher_prompts, responses, strict=True):
        log_ps = torch.log_softmax(next_token_logits(student, prompt, response.ids) / temperature, -1)
        with torch.no_grad():
            log_pt = torch.log_softmax(next_token_logits(teacher, teacher_prompt, response.ids) / temperature, -1)
        yield log_ps, log_pt, torch.tensor(response.ids)[:, None]


def kl(log_p, log_q):  # KL(p || q) = E_p[log p - log q], (R, V) -> (R,)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_loss(name, log_ps, log_pt, ids, jsd_beta=0.5):  # -> (R,)
    if name == "reverse_kl":
        return kl(log_ps, log_pt)
    if name == "forward_kl":
        return kl(log_pt, log_ps)
    if name == "jsd":
        log_m = ((1 - jsd_beta) * log_ps.exp() + jsd_beta * log_pt.exp()).log()
        return jsd_beta * kl(log_pt, log_m) + (1 - jsd_beta) * kl(log_ps, log_m)
    if name == "ce":
        return -log_ps.gather(1, ids)[:, 0]
    logprob = log_ps.gather(1, ids)[:, 0]
    return -(log_pt.gather(1, ids)[:, 0] - logprob).detach() * logprob  # "sampled": a policy gradient


OPD = dict(prompts_per_step=10, max_response_tokens=20, max_steps=1, dtype="float64")


def opd_script(loss: str) -> str:
    """The script that has the loss."""
    return "variants/opd_sampled" if loss == "sampled" else "opd"


@pytest.mark.parametrize("teacher", ["wide", "narrow", "llama"])
@pytest.mark.parametrize(
    "loss, temperature", [("reverse_kl", 1.0), ("reverse_kl", 0.7), ("forward_kl", 0.7), ("jsd", 0.7), ("sampled", 0.7)]
)
def test_opd_gradient_equals_the_formula(run_script, checkpoints, data, teacher, loss, temperature):
    folder = getattr(checkpoints, teacher)
    flags = {"loss": loss, "temperature": temperature} | ({"jsd_beta": 0.3} if loss == "jsd" else {})
    run = run_script(opd_script(loss), teacher=folder, student=checkpoints.student, train_data=data, **flags, **OPD)
    [rollout], [(params, actual)] = run.samples, run.updates
    student, rows = model_at(checkpoints.student, params), []
    for log_ps, log_pt, ids in naive_divergences(student, load(folder), rollout, rollout[0], temperature):
        rows.append((token_loss(loss, log_ps, log_pt, ids, 0.3), kl(log_ps, log_pt), kl(log_pt, log_ps)))
    losses, reverse_kl, forward_kl = (torch.cat(column) for column in zip(*rows, strict=True))
    assert_close(actual, gradient_of(student, losses.mean()))
    [logged] = run.metrics
    assert logged["losses/policy_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6)  # KL(student || teacher)
    assert logged["losses/forward_kl"] == pytest.approx(float(forward_kl.mean()), rel=1e-6)  # KL(teacher || student)
    assert abs(float(reverse_kl.mean() - forward_kl.mean())) > 0.05, "the two directions should be told apart"
    norm = torch.cat([g.flatten() for g in actual.values()]).norm()
    assert logged["losses/grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("loss, tis_cap", [("sampled", 2.0), ("sampled", 0.0), ("reverse_kl", None)])
def test_opd_weights_tokens_of_another_sampler(run_script, checkpoints, data, disagreeing_sampler, loss, tis_cap):
    """Only where the loss is an expectation over the sampled token."""
    flags = {"loss": loss, "sampler": "vllm"} | ({"tis_cap": tis_cap} if loss == "sampled" else {})
    pair = {"teacher": checkpoints.narrow, "student": checkpoints.student}
    run = run_script(opd_script(loss), **pair, train_data=data, **OPD, **flags)
    [rollout], [(params, actual)] = run.samples, run.updates
    student, losses = model_at(checkpoints.student, params), []
    naive = naive_divergences(student, load(checkpoints.narrow), rollout, rollout[0], 1.0)
    for (log_ps, log_pt, ids), response in zip(naive, rollout[2], strict=True):
        cap = tis_cap if loss == "sampled" else 0
        weights = importance_weights(log_ps.gather(1, ids)[:, 0], response, cap)
        losses.append(weights * token_loss(loss, log_ps, log_pt, ids))
    assert_close(actual, gradient_of(student, torch.cat(losses).mean()))


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "sampled"])
def test_opd_gradient_does_not_depend_on_the_micro_batches(run_script, checkpoints, data, loss):
    args = OPD | {"teacher": checkpoints.narrow, "student": checkpoints.student, "train_data": data, "loss": loss}
    whole = run_script(opd_script(loss), **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):  # teacher and student pass over the same ones
        split = run_script(opd_script(loss), **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])
        for key in ("losses/policy_loss", "losses/reverse_kl", "losses/entropy", "debug/sampler_logprob_diff_mean"):
            assert split.metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-6, abs=1e-9), key


@pytest.mark.parametrize("teacher", ["wide", "narrow", "llama"])  # the last has a head that is not tied
def test_opd_needs_nothing_of_an_offloaded_teacher_but_its_head(run_script, checkpoints, data, teacher, monkeypatch):
    """There is no GPU to leave here: leaving it puts nan in place of every weight, and coming back restores them."""
    args = OPD | {
        "teacher": getattr(checkpoints, teacher),
        "student": checkpoints.student,
        "train_data": data,
        "max_steps": 2,
    }
    expected = run_script("opd", **args)
    weights, places = {}, []

    @contextlib.contextmanager
    def travel(model, device, offload):
        assert offload
        for name, parameter in model.named_parameters():
            parameter.data = weights.get(name, parameter.data)
        places.append(device)
        yield
        for name, parameter in model.named_parameters():
            weights[name], parameter.data = parameter.data, torch.full_like(parameter, float("nan"))
        places.append("home")

    monkeypatch.setattr(models, "on_device", travel)
    run = run_script("opd", **args, offload_teacher=True)
    assert places == 3 * [torch.device("cpu"), "home"]  # for the preflight and each step
    assert_close(run.updates[1][1], expected.updates[1][1])


def test_opd_with_the_student_as_its_own_teacher_starts_at_zero(run_script, checkpoints, data):
    for folder in (checkpoints.student, checkpoints.narrow):
        run = run_script(
            "opd", teacher=folder, student=folder, train_data=data, prompts_per_step=10, max_response_tokens=20, max_steps=1
        )
        row = run.metrics[0]
        assert abs(row["losses/reverse_kl"]) < 1e-5 and abs(row["losses/forward_kl"]) < 1e-5
        assert row["losses/grad_norm"] < 1e-4


def test_opd_teacher_reads_the_response_behind_its_own_prompt(run_script, checkpoints, data, tmp_path):
    """Another chat template for the same ids: the divergence must be taken behind two different prompts."""
    teacher = tmp_path / "teacher"
    load(checkpoints.wide, torch.float32).save_pretrained(teacher)
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<|system|>{{ '7' if enable_thinking else '3' }}" + toy.CHAT_TEMPLATE
    tokenizer.save_pretrained(teacher)
    models = {"teacher": str(teacher), "student": checkpoints.student}
    run = run_script("opd", **models, train_data=data, teacher_thinking=True, force=True, **OPD)  # preflight refuses
    [rollout], [(params, actual)] = run.samples, run.updates
    own = [[toy.ID["<|system|>"], 7, *prompt] for prompt in rollout[0]]
    student = model_at(checkpoints.student, params)
    rows = naive_divergences(student, load(teacher), rollout, own, 1.0)
    reverse_kl = torch.cat([kl(log_ps, log_pt) for log_ps, log_pt, _ in rows])
    assert run.metrics[0]["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6)
    assert_close(actual, gradient_of(student, reverse_kl.mean()))


WARMUP = dict(rollouts_per_prompt=2, rollouts_per_step=24, max_response_tokens=20, max_steps=1, dtype="float64")


@pytest.mark.parametrize("loss, temperature", [("forward_kl", 1.0), ("forward_kl", 0.7), ("ce", 1.0), ("ce", 0.7)])
def test_warmup_gradient_equals_the_formula(run_script, checkpoints, data, loss, temperature):
    run = run_script(
        "fkl_warmup",
        teacher=checkpoints.wide,
        student=checkpoints.student,
        train_data=data,
        loss=loss,
        temperature=temperature,
        **WARMUP,
    )
    [(prompts, n, responses)], [(params, actual)] = run.samples, run.updates
    rollout = [prompt for prompt in prompts for _ in range(n)], 1, responses
    student, teacher, rows = model_at(checkpoints.student, params), load(checkpoints.wide), []
    for log_ps, log_pt, ids in naive_divergences(student, teacher, rollout, rollout[0], temperature):
        rows.append((token_loss(loss, log_ps, log_pt, ids), kl(log_pt, log_ps), kl(log_ps, log_pt)))
    if loss == "ce":  # SFT has no temperature
        losses = torch.cat([token_loss("ce", *row) for row in naive_divergences(student, teacher, rollout, rollout[0], 1.0)])
    else:
        losses = torch.cat([row[0] for row in rows])
    forward_kl, reverse_kl = (torch.cat([row[i] for row in rows]).mean() for i in (1, 2))
    assert_close(actual, gradient_of(student, losses.mean()))
    [logged] = run.metrics
    assert logged["losses/policy_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert logged["losses/forward_kl"] == pytest.approx(float(forward_kl), rel=1e-6)  # KL(teacher || student)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl), rel=1e-6)


@pytest.mark.parametrize("loss", ["forward_kl", "ce"])
def test_warmup_gradient_does_not_depend_on_the_micro_batches(run_script, checkpoints, data, loss):
    args = WARMUP | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "loss": loss}
    whole = run_script("fkl_warmup", **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):
        split = run_script("fkl_warmup", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])
        assert split.metrics[0]["losses/forward_kl"] == pytest.approx(whole.metrics[0]["losses/forward_kl"], rel=1e-6)


def test_warmup_reuses_saved_rollouts(run_script, checkpoints, data):
    args = WARMUP | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "max_steps": 2}
    first = run_script("fkl_warmup", **args)
    rows = read_jsonl(first.out / "rollouts.jsonl")
    prompts, n, responses = first.samples[0]
    assert [(row["response_ids"], row["truncated"]) for row in rows] == [(r.ids, r.truncated) for r in responses]
    second = run_script("fkl_warmup", **args, rollouts=str(first.out / "rollouts.jsonl"))
    assert second.samples == []
    assert_equal_checkpoints(first.out, second.out)


def test_warmup_of_a_student_that_equals_the_teacher_starts_at_zero(run_script, checkpoints, data):
    run = run_script(
        "fkl_warmup",
        teacher=checkpoints.student,
        student=checkpoints.student,
        train_data=data,
        rollouts_per_step=12,
        max_response_tokens=20,
        max_steps=1,
    )
    assert abs(run.metrics[0]["losses/forward_kl"]) < 1e-5 and run.metrics[0]["losses/grad_norm"] < 1e-4


# --------------------------------------------------------------------------------------------------- all three alike
def assert_equal_checkpoints(a: Path, b: Path):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def small_run(script, world):
    """Arguments of a run of three steps on the toy's models, with the real grader."""
    models = (
        {"model": str(world / "student_base")}
        if script == "grpo"
        else {"teacher": str(world / "teacher_base"), "student": str(world / "student_base")}
    )
    own = {
        "grpo": {"prompts_per_step": 16, "minibatch_prompts": 8, "group_size": 8, "grader": "boxed"},
        "fkl_warmup": {"rollouts_per_step": 8},
        "opd": {"prompts_per_step": 8},
    }[script]
    return (
        models
        | own
        | {"train_data": str(world / "train.jsonl"), "max_response_tokens": 16, "max_steps": 3, "learning_rate": 1e-3}
    )


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_the_same_command_gives_bit_identical_weights(run_script, world, script):
    args = small_run(script, world)
    first, second, other = run_script(script, **args), run_script(script, **args), run_script(script, **args, seed=2)
    assert_equal_checkpoints(first.out, second.out)
    timed = ("time/", "charts/tokens_per_sec")
    untimed = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in run.metrics] for run in (first, second)]
    assert untimed[0] == untimed[1]
    assert (first.out / "model.safetensors").read_bytes() != (other.out / "model.safetensors").read_bytes()
    assert (first.out / "model.safetensors").read_bytes() != (world / "student_base" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_every_step_logs_the_same_finite_metrics(run_script, world, script):
    run = run_script(script, **small_run(script, world), eval_data=str(world / "test.jsonl"), eval_every=2)
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3]
    evaluation = {"step", "eval/accuracy", "eval/response_length"}
    before, first, *later = [set(row) for row in run.metrics]
    assert before == evaluation  # before training
    assert later == [first | evaluation, first | evaluation]  # at --eval-every, and at the end
    assert all(torch.isfinite(torch.tensor(value)) for row in run.metrics for value in row.values())
    for row in run.metrics[1:]:
        assert row["time/step"] >= row["time/train"] > 0 and row["charts/tokens_per_sec"] > 0
        assert 0 <= row["charts/truncated_frac"] <= 1 and 1 <= row["charts/response_length"] <= 16


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_gradient_checkpointing_changes_no_weight(run_script, world, script):
    args = small_run(script, world) | {"max_steps": 1}
    plain, recomputed = run_script(script, **args), run_script(script, **args, gradient_checkpointing=True)
    assert_close(recomputed.updates[0][1], plain.updates[0][1])
    assert_equal_checkpoints(plain.out, recomputed.out)


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_bfloat16_trains_float32_masters(run_script, world, script):
    run = run_script(script, **small_run(script, world), dtype="bfloat16")
    assert all(p.dtype == torch.float32 for p in run.updates[0][0].values())
    assert {p.dtype for p in load(run.out, "auto").parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(value)) for row in run.metrics for value in row.values())


@pytest.mark.parametrize("script", ["fkl_warmup", "opd"])
def test_dense_stages_need_no_answers_and_use_no_labels(run_script, world, tmp_path, script):
    rows = [{"problem": row["problem"]} for row in read_jsonl(world / "train.jsonl")]
    args = small_run(script, world) | {"train_data": write_jsonl(tmp_path / "unlabeled.jsonl", rows), "max_steps": 1}
    run = run_script(script, **args)
    assert run.record["labels_used"] == 0 and "charts/labels_used" not in run.metrics[0]
