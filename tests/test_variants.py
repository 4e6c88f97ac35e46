"""The variants of docs/variants.md: each one's gradient against the formula in float64, its independence of the micro-batch
split and of the ranks, what it counts and logs, what a user may get wrong, and how far it is from its original."""

import ast
import contextlib
import difflib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, FakeGrader, load, random_model, write_jsonl
from files import tracked
from test_bad_input import assert_refused, typed  # noqa: F401  (a fixture)
from test_parallel import SMALL, TIMES, difference, torchrun
from test_scripts import (
    OPD,
    WARMUP,
    assert_close,
    assert_unchanged,
    budget_for,
    disagreeing_sampler,  # noqa: F401
    gradient_of,
    importance_weights,
    kl,
    model_at,
    naive_divergences,
    token_loss,
)

import toy
from infra import dataset, prompts
from kernels import TeacherTopK

ORIGINAL = {"opd_weighted": "opd", "fkl_weighted": "fkl_warmup", "opd_sampled": "opd", "opd_topk": "opd"}
SERVER_PACKAGES = "uvicorn watchfiles jmespath model_hosting_container_standards prometheus_fastapi_instrumentator".split()
WEIGHTED = {"opd": "variants/opd_weighted", "fkl_warmup": "variants/fkl_weighted"}


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
    answers = {tuple(prompts.render_prompt(tokenizer, p, "", False)): p.answer for p in problems}
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
    ALL_AT_ONCE,
    ALL_AT_ONCE | {"loss": "jsd"},
]


def name_of(flags):
    return " ".join(f"{name}={value}" for name, value in flags.items())


# ------------------------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("teacher", ["wide", "narrow"])
@pytest.mark.parametrize("flags", FLAGS, ids=name_of)
def test_opd_gradient_equals_the_formula(run_script, fake_grader, checkpoints, data, problems, generations, teacher, flags):
    fake_grader(reward)
    models = {"teacher": getattr(checkpoints, teacher), "student": checkpoints.student}
    run = run_script("variants/opd_weighted", **models, train_data=data, **OPD, **with_file(flags, generations))
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
    run = run_script("variants/fkl_weighted", **models, train_data=data, **WARMUP, **with_file(flags, generations))
    [(prompts, n, responses)], [(params, actual)], [logged] = run.samples, run.updates, run.metrics
    rollout = [prompt for prompt in prompts for _ in range(n)], 1, responses
    student = model_at(checkpoints.student, params)
    expected, weights, reverse_kl = naive(student, load(checkpoints.wide), rollout, problems, flags)
    assert_close(actual, gradient_of(student, expected))
    assert logged["losses/policy_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6)
    assert logged["charts/trained_frac"] == pytest.approx(float((weights > 0).double().mean()))
    assert logged["charts/labels_used"] == run.record["labels_used"] == 12


@pytest.mark.parametrize("flags", [FLAGS[0], ALL_AT_ONCE], ids=name_of)
def test_opd_gradient_does_not_depend_on_the_micro_batches(run_script, fake_grader, checkpoints, data, generations, flags):
    fake_grader(reward)
    args = OPD | {"teacher": checkpoints.narrow, "student": checkpoints.student, "train_data": data}
    args |= with_file(flags, generations)
    whole = run_script("variants/opd_weighted", **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):
        split = run_script("variants/opd_weighted", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])
        for key in ("losses/policy_loss", "losses/reverse_kl", "charts/trained_frac"):
            assert split.metrics[0][key] == pytest.approx(whole.metrics[0][key], rel=1e-6, abs=1e-9), key


def test_warmup_gradient_does_not_depend_on_the_micro_batches(run_script, fake_grader, checkpoints, data, generations):
    fake_grader(reward)
    args = WARMUP | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data}
    args |= {"paced": generations, "reward_weight": 0.7}
    whole = run_script("variants/fkl_weighted", **args, micro_batch_tokens=10**6)
    for count in (1, 2, 7):
        split = run_script("variants/fkl_weighted", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert [len(groups) for _, groups in split.splits] == [count]
        assert_close(split.updates[0][1], whole.updates[0][1])


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_neutral_weights_are_the_original_bit_for_bit(run_script, checkpoints, data, script):
    args = {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "max_response_tokens": 12}
    args |= {"prompts_per_step" if script == "opd" else "rollouts_per_step": 5, "max_steps": 3, "learning_rate": 1e-3}
    original = run_script(script, **args, micro_batch_tokens=60)
    neutral = {"paced": None, "reward_weight": 0.0} | ({"tip_fraction": 1.0} if script == "opd" else {})
    variant = run_script(WEIGHTED[script], **args, **neutral, micro_batch_tokens=60)
    assert_unchanged(variant.out, original.out)
    assert variant.record["command"] == f"python {WEIGHTED[script]}.py --as-typed", "bridge.py compares it with its own"
    for row, expected in zip(variant.metrics, original.metrics, strict=True):
        assert row.pop("charts/trained_frac") == 1
        assert {k: v for k, v in row.items() if not k.startswith(TIMES)} == {
            k: v for k, v in expected.items() if not k.startswith(TIMES)
        }


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_equal_weights_are_no_weights(run_script, fake_grader, checkpoints, data, problems, tmp_path, script):
    """Every problem passed half of the time, every response right: nothing but the sum of the weights has changed."""
    fake_grader(lambda answer, j: 1.0)
    even = write_generations(tmp_path / "even.jsonl", problems, lambda answer: 0.5)
    args = (OPD if script == "opd" else WARMUP) | {"teacher": checkpoints.wide, "student": checkpoints.student}
    plain = run_script(WEIGHTED[script], train_data=data, **args)
    weighted = run_script(WEIGHTED[script], train_data=data, **args, paced=even, reward_weight=0.5)
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
    one = run_script(WEIGHTED[script], **args, reward_weight=1.0, max_steps=1)
    calls.clear()
    two = run_script(WEIGHTED[script], **args, reward_weight=1.0, max_steps=2)
    assert [row["charts/reward"] for row in two.metrics] == [1, 0]
    assert two.metrics[1]["losses/grad_norm"] == two.metrics[1]["losses/policy_loss"] == 0
    assert two.metrics[1]["losses/reverse_kl"] > 0, "it is still measured"
    assert two.record["updates"] == one.record["updates"] == 1, "and is no update"
    assert_unchanged(two.out, one.out)


def test_labels_are_counted(run_script, fake_grader, checkpoints, data, generations):
    fake_grader(reward)
    args = OPD | {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "prompts_per_step": 5}
    args |= {"max_steps": 2, "sample_every": 0}
    weighted = run_script("variants/opd_weighted", **args, reward_weight=0.5)
    assert [row["charts/labels_used"] for row in weighted.metrics] == [5, 10] and weighted.record["labels_used"] == 10
    assert 0 < sum(row["charts/reward"] for row in weighted.metrics) < 2
    paced = run_script("variants/opd_weighted", **args, paced=generations)
    assert [row["charts/labels_used"] for row in paced.metrics] == [12, 12] and paced.record["labels_used"] == 12
    assert run_script("variants/opd_weighted", **args, tip_fraction=0.5).record["labels_used"] == 0


@pytest.mark.slow
def test_ranks_give_the_single_process_weights(run_script, fake_grader, checkpoints, data, generations, server, tmp_path):
    fake_grader(FakeGrader.rule)
    distil = SMALL | {"student": checkpoints.llama, "teacher": checkpoints.narrow, "train_data": data, "paced": generations}
    flags = {
        "tip": ("variants/opd_weighted", {"prompts_per_step": 7, "tip_fraction": 0.4}),
        "one": ("variants/opd_weighted", {"prompts_per_step": 1, "tip_fraction": 0.4, "paced": None}),
        "warmup": ("variants/fkl_weighted", {"rollouts_per_step": 5, "rollouts_per_prompt": 2, "reward_weight": 0.7}),
    }
    served = {name: value for name, value in distil.items() if name not in ("teacher", "paced")}
    served |= {"teacher_url": server.url, "teacher_model": "tiny", "top_k": 5}

    def jobs(folder):
        runs = [[name, script, distil | own] for name, (script, own) in flags.items()]
        runs += [[f"topk{n}", "variants/opd_topk", served | {"prompts_per_step": n}] for n in (1, 7)]
        return [[script, args | {"out": f"{tmp_path}/{folder}/{name}"}] for name, script, args in runs]

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


# ------------------------------------------------------------------------------------------------------ sampled tokens
@pytest.mark.parametrize(
    "flags", [{}, {"temperature": 0.7}, {"sampler": "vllm"}, {"sampler": "vllm", "tis_cap": 0.0}], ids=name_of
)
def test_reward_free_gradient_equals_the_formula(run_script, checkpoints, data, disagreeing_sampler, flags):  # noqa: F811
    """An advantage of -1 at every token; with vllm it is weighted as in grpo.py."""
    args = OPD | {"teacher": checkpoints.narrow, "student": checkpoints.student, "train_data": data, "loss": "reward_free"}
    run = run_script("variants/opd_sampled", **args, **flags)
    [rollout], [(params, actual)], [logged] = run.samples, run.updates, run.metrics
    student, teacher, losses, kls = model_at(checkpoints.student, params), load(checkpoints.narrow), [], []
    pairs = naive_divergences(student, teacher, rollout, rollout[0], flags.get("temperature", 1.0))
    for (log_ps, log_pt, ids), response in zip(pairs, rollout[2], strict=True):
        logprob = log_ps.gather(1, ids)[:, 0]
        cap = flags.get("tis_cap", 2.0) if flags.get("sampler") == "vllm" else 0
        losses.append(importance_weights(logprob, response, cap) * logprob)
        kls.append(kl(log_ps, log_pt))
    expected = torch.cat(losses).mean()
    assert_close(actual, gradient_of(student, expected))
    assert logged["losses/policy_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(torch.cat(kls).detach().mean()), rel=1e-6), (
        "the teacher is measured"
    )


def test_reward_free_does_not_heed_the_teacher(run_script, checkpoints, data):
    args = OPD | {"student": checkpoints.student, "train_data": data, "loss": "reward_free"}
    one, other = (run_script("variants/opd_sampled", **args, teacher=t) for t in (checkpoints.narrow, checkpoints.wide))
    assert_unchanged(one.out, other.out)
    assert one.metrics[0]["losses/reverse_kl"] != other.metrics[0]["losses/reverse_kl"]


def test_reward_free_gradient_does_not_depend_on_the_micro_batches(run_script, checkpoints, data):
    args = OPD | {"teacher": checkpoints.narrow, "student": checkpoints.student, "train_data": data, "loss": "reward_free"}
    whole = run_script("variants/opd_sampled", **args, micro_batch_tokens=10**6)
    for count in (2, 7):
        split = run_script("variants/opd_sampled", **args, micro_batch_tokens=budget_for(whole.splits[0][0], count))
        assert_close(split.updates[0][1], whole.updates[0][1])


# -------------------------------------------------------------------------------------------- a teacher behind a server
class Teacher(BaseHTTPRequestHandler):
    """vLLM's /v1/models and /v1/completions, as far as opd_topk.py reads them, from a transformers model in float64."""

    def do_GET(self):
        models = {"data": [{"id": "tiny", "max_model_len": self.server.positions}]}
        self.answer(200, models) if self.path == "/v1/models" else self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:  # one model, several threads
            self.server.seen.append(body)
            failure = self.server.failures.pop(0) if self.server.failures else None
            model, ids, K = self.server.model, body["prompt"], body["prompt_logprobs"]
            assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 1, 1)
            if failure:
                return self.answer(failure, {"error": {"message": "busy"}})
            if max(ids) >= model.config.vocab_size:
                return self.answer(400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}})
            if K > self.server.max_logprobs:
                return self.answer(400, {"error": {"message": f"Requested prompt logprobs of {K}"}})
            with torch.no_grad():
                logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
        entries = [None]
        for row, token in zip(logprobs, ids[1:], strict=False):
            top = row.topk(K).indices.tolist()
            ranks = {token: int((row > row[token]).sum()) + 1} | {i: rank for rank, i in enumerate(top, 1)}
            text = self.server.tokenizer.decode
            one = {str(i): {"logprob": float(row[i]), "rank": r, "decoded_token": text([i])} for i, r in ranks.items()}
            entries.append(one)
        self.answer(200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": entries}]})

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(checkpoints, monkeypatch):
    """The server of the teacher `narrow`: url, seen (bodies of the requests), and what a test may change: model, tokenizer,
    positions, max_logprobs, failures (status codes to answer the next requests with)."""
    monkeypatch.setattr(TOPK, "RETRY_WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    httpd.lock, httpd.seen, httpd.failures = threading.Lock(), [], []
    httpd.model, httpd.tokenizer, httpd.positions, httpd.max_logprobs = (
        load(checkpoints.narrow),
        toy.make_tokenizer(),
        512,
        64,
    )
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


TOPK = SCRIPTS["variants/opd_topk"]
VOCABULARY = len(toy.ID)


def with_tail(log_p, top):  # (R, V), (R, K) -> (R, K + 1): the log-probabilities of the K ids, and of all others together
    others = log_p.scatter(1, top, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(1, top), others], 1)


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd"])
def test_topk_gradient_equals_the_formula(run_script, checkpoints, data, server, loss, K):
    args = OPD | {
        "student": checkpoints.student,
        "train_data": data,
        "loss": loss,
        "jsd_beta": 0.3,
        "micro_batch_tokens": 100,
    }
    run = run_script("variants/opd_topk", teacher_url=server.url, teacher_model="tiny", top_k=K, **args)
    [rollout], [(params, actual)], [logged] = run.samples, run.updates, run.metrics
    student, rows = model_at(checkpoints.student, params), []
    for log_ps, log_pt, ids in naive_divergences(student, load(checkpoints.narrow), rollout, rollout[0], 1.0):
        top = log_pt.topk(K).indices
        pair = with_tail(log_ps, top), with_tail(log_pt, top)
        rows.append((token_loss(loss, *pair, ids, 0.3), kl(*pair), -(log_ps.exp() * log_ps).sum(-1), pair[1][:, -1].exp()))
    losses, reverse_kl, entropy, tail = (torch.cat(column) for column in zip(*rows, strict=True))
    gradient = gradient_of(student, losses.mean())
    assert len(run.splits[0][1]) > 1
    assert_close(actual, gradient)
    losses, reverse_kl, entropy = losses.detach(), reverse_kl.detach(), entropy.detach()
    assert logged["losses/policy_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert logged["losses/reverse_kl"] == pytest.approx(float(reverse_kl.mean()), rel=1e-6)
    assert logged["losses/entropy"] == pytest.approx(float(entropy.mean()), rel=1e-6), "over the vocabulary"
    assert logged["debug/teacher_tail"] == pytest.approx(float(tail.mean()), rel=1e-6) and tail.mean() > 0.05


def test_topk_of_all_ids_is_opd(run_script, checkpoints, data, server):
    args = OPD | {"student": checkpoints.student, "train_data": data}
    run = run_script("variants/opd_topk", teacher_url=server.url, teacher_model="tiny", top_k=VOCABULARY, **args)
    whole = run_script("opd", teacher=checkpoints.narrow, **args)
    assert_close(run.updates[0][1], whole.updates[0][1])
    assert run.metrics[0]["losses/reverse_kl"] == pytest.approx(whole.metrics[0]["losses/reverse_kl"], rel=1e-9)
    assert 0 < run.record["flops"] < whole.record["flops"], "the teacher computes elsewhere"


def test_topk_keeps_the_teachers_k_likeliest_not_the_token_itself():
    """vLLM adds the token itself where it is not among them, in front."""

    def entry(*ids):
        return {str(i): {"logprob": -float(rank), "rank": rank} for rank, i in ids}

    answer = [None, None, entry((9, 4), (1, 7), (2, 3)), entry((2, 3), (1, 0))]
    args = SimpleNamespace(teacher_model="tiny", teacher_url="http://x/v1", top_k=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOPK, "ask", lambda *_: {"choices": [{"prompt_logprobs": answer}]})
        scored = TOPK.score(args, 10, [1, 2], [4, 3])
    assert isinstance(scored, TeacherTopK)
    assert scored.ids.tolist() == [[7, 3], [0, 3]] and scored.logprobs.tolist() == [[-1, -2], [-1, -2]]


def typed_topk(typed, server, **changes):  # noqa: F811
    flags = typed("opd", **{"teacher_url": server.url, "teacher_model": "tiny", "top_k": 4} | changes)
    at = flags.index("--teacher")
    return flags[:at] + flags[at + 2 :]


def test_topk_command_works_and_asks_again_where_a_failure_may_pass(cli, typed, server):  # noqa: F811
    server.failures = [503, 500]
    code, out, err = cli("variants/opd_topk", *typed_topk(typed, server))
    assert code == 0, err
    assert "tiny answers" in out and len(server.seen) == 2 + 1 + 4


def test_a_teacher_that_cannot_be_asked(cli, typed, server, checkpoints, tmp_path):  # noqa: F811
    def refused(*patterns, **changes):
        assert_refused(cli("variants/opd_topk", *typed_topk(typed, server, **changes)), *patterns)
        assert not (tmp_path / "out").exists(), "before the run begins"

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    refused("--teacher-url", "no answer", "refused", "start the server", teacher_url=away)
    refused("--teacher-url", "http://host:8000/v1", teacher_url="localhost:8000")
    refused("--teacher-url", "404", "should end in /v1", teacher_url=server.url.removesuffix("/v1"))
    refused("--teacher-model other", "the server has tiny", teacher_model="other")
    refused("--temperature", "at 1", temperature=0.7)
    refused("--top-k", top_k=0)
    refused("prompt logprobs of 65", "--max-logprobs 65", top_k=65)
    server.failures = 3 * [503]
    refused("--teacher-url", "no answer", "busy")
    server.positions = 16
    refused("--max-response-tokens 4", "16 positions", "--max-model-len")


def test_a_teacher_of_another_tokenizer(cli, typed, server):  # noqa: F811
    words = server.tokenizer.decode
    server.tokenizer = SimpleNamespace(decode=lambda ids: "?" if ids == [VOCABULARY - 1] else words(ids))
    result = cli("variants/opd_topk", *typed_topk(typed, server))
    assert_refused(result, "--teacher-model tiny", f"id {VOCABULARY - 1} is '\\?'", "one tokenizer")
    server.tokenizer, server.model = toy.make_tokenizer(), random_model(vocab_size=VOCABULARY - 5).double()
    assert_refused(cli("variants/opd_topk", *typed_topk(typed, server)), "--teacher-url", "out of vocabulary")
    server.model = random_model(vocab_size=4 * VOCABULARY).double()
    assert_refused(cli("variants/opd_topk", *typed_topk(typed, server)), "--teacher-model tiny", "one tokenizer")


def test_a_teacher_that_leaves_during_the_run(cli, typed, server, tmp_path):  # noqa: F811
    flags = typed_topk(typed, server, max_steps=3, save_every=1, teacher_requests=1)
    expected = typed_topk(typed, server, max_steps=3, save_every=1, out=tmp_path / "whole")
    assert cli("variants/opd_topk", *expected)[0] == 0
    server.seen.clear()
    answer = Teacher.do_POST

    def leave(self):
        server.failures = 3 * [503] if len(server.seen) >= 1 + 4 else []  # behind the first step
        answer(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "do_POST", leave)
        code, _, err = cli("variants/opd_topk", *flags)
    assert code == 3 and "step 2: --teacher-url" in err and "--resume" in err, err
    assert "step 2" in json.loads((tmp_path / "out" / "run.json").read_text())["stopped"]
    server.failures = []
    code, out, err = cli("variants/opd_topk", *flags, "--resume")
    assert code == 0 and "resumed" in out, err
    assert_unchanged(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm: make env-vllm")
def test_topk_from_a_real_server(run_script, checkpoints, data, tmp_path, monkeypatch):
    """vLLM's own server on this CPU: what it says of the teacher trains the student as the teacher itself would."""
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"vLLM's server needs {', '.join(missing)}")
    folder = tmp_path / "teacher"
    teacher = random_model(head_dim=32, seed=5)  # vLLM's CPU attention has no heads of 16
    teacher.save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    flags += ["--max-logprobs", "6", "--max-model-len", "128", "--served-model-name", "tiny"]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = os.environ | quiet | {"VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        args = OPD | {"student": checkpoints.student, "train_data": data, "top_k": 6}
        run = run_script("variants/opd_topk", teacher_url=f"http://127.0.0.1:{port}/v1", teacher_model="tiny", **args)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers too
        server.wait()
    [rollout], [(params, actual)] = run.samples, run.updates
    student, losses = model_at(checkpoints.student, params), []
    for log_ps, log_pt, _ in naive_divergences(student, teacher.double(), rollout, rollout[0], 1.0):
        top = log_pt.topk(6).indices
        losses.append(kl(with_tail(log_ps, top), with_tail(log_pt, top)))
    assert_close(actual, gradient_of(student, torch.cat(losses).mean()), 1e-4)


# --------------------------------------------------------------------------------------------- variant and original
def test_every_variant_has_an_original():
    assert sorted(ORIGINAL) == sorted(Path(path).stem for path in tracked("variants/*.py"))


@pytest.mark.parametrize("name, bound", [("opd_weighted", 92), ("fkl_weighted", 69), ("opd_sampled", 62), ("opd_topk", 196)])
def test_a_variant_stays_near_its_original(name, bound):
    """Lines that a reader of `diff` has to look at. Change both files, or raise the bound."""
    texts = [(ROOT / path).read_text().splitlines() for path in (f"{ORIGINAL[name]}.py", f"variants/{name}.py")]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert len(changed) <= bound, f"{len(changed)} lines differ"
    docstring = ast.get_docstring(ast.parse("\n".join(texts[1])))
    assert f"{ORIGINAL[name]}.py" in docstring.split("\n\n")[0] and f"python variants/{name}.py" in docstring


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "opd_sampled" else []) for n in ORIGINAL])
def test_a_variant_starts_from_anywhere(tmp_path, name):
    """As a user types it: nothing of the repository is on the path but what the script puts there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    command = [sys.executable, ROOT / "variants" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--(paced|tis-cap|teacher-url)", done.stdout) and "algorithm options" in done.stdout
    assert f"{ORIGINAL[name]}.py" in " ".join(done.stdout.split())


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("script, name, value", [
    ("opd", "tip_fraction", 0), ("opd", "tip_fraction", 1.5), ("opd", "reward_weight", -0.1), ("opd", "reward_weight", 2),
    ("fkl_warmup", "reward_weight", -0.1), ("fkl_warmup", "reward_weight", 2),
])  # fmt: skip
def test_an_impossible_value_names_its_flag(cli, typed, script, name, value):  # noqa: F811
    assert_refused(cli(WEIGHTED[script], *typed(script, **{name: value})), "--" + name.replace("_", "-"))


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_rewards_need_answers(cli, typed, problems, tmp_path, script):  # noqa: F811
    unlabeled = write_jsonl(tmp_path / "unlabeled.jsonl", [{"problem": p.text} for p in problems])
    result = cli(WEIGHTED[script], *typed(script, train_data=unlabeled, reward_weight=0.5))
    assert_refused(result, "--train-data", "needs a column answer")


@pytest.mark.parametrize("script", ["opd", "fkl_warmup"])
def test_a_file_that_gives_no_weights(cli, typed, problems, tmp_path, script):  # noqa: F811
    path = tmp_path / "generations.jsonl"
    assert_refused(cli(WEIGHTED[script], *typed(script, paced=tmp_path / "none.jsonl")), "--paced", "Check the path")
    write_jsonl(path, [{"problem": p.text} for p in problems])
    assert_refused(cli(WEIGHTED[script], *typed(script, paced=path)), "--paced", "needs problem and reward", "eval_math.py")
    write_generations(path, problems[:-2])
    assert_refused(
        cli(WEIGHTED[script], *typed(script, paced=path)), "--paced", "lacks 2 of the 12 problems", "eval_math.py"
    )
    write_generations(path, problems, lambda answer: reward(answer))
    assert_refused(
        cli(WEIGHTED[script], *typed(script, paced=path)), "--paced", "always or never", "raise eval_math.py's --samples"
    )
