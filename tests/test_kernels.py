"""kernels/: values and gradients against the float64 references, edge values, chunking, and the Triton leaves.

The Triton leaves are tested without a GPU, each in a process of its own (the interpreter and the compiler do not share
one): kernels_interpret.py runs them on the CPU, kernels_aot.py compiles them for sm_80 and sm_90. On a machine with a
GPU, kernels_cuda.py compares whole losses.
"""

import ast
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.divergence
import kernels.divergence_torch
import kernels.linear
import kernels.logprob
from kernels import (
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    divergence_from_logits,
    fused_linear_divergence,
    fused_linear_logprob,
    head_weight,
)
from kernels.divergence_torch import reference_divergence
from kernels.linear import rows_per_chunk
from kernels.logprob import reference_logprob

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.0), ("jsd", 1.0)]
N, V, HS, HT, K = 6, 13, 5, 7, 4
ROOT = Path(__file__).parent.parent
INF = float("inf")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, grad=False, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def limit(kind, jsd_beta):
    """jsd at its ends is the KL itself, by definition."""
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(jsd_beta, kind) if kind == "jsd" else kind


def reference_buckets(zs, zt, ids, temperature=1.0):  # (N, V), (N, V), (N, K) -> (N, K + 1) log-masses, twice
    """Probabilities, summed: what topk_buckets does in logarithms."""

    def buckets(z):
        p = torch.softmax(z.double() / temperature, -1)
        top = p.gather(1, ids)
        return torch.cat((top, 1 - top.sum(-1, keepdim=True)), 1).log()

    return buckets(zs), buckets(zt)


def make_teacher(how, hidden, head, temperature=1.0):
    logits = hidden @ head.T
    if how == "head":
        return TeacherHead(hidden, head)
    if how == "logits":
        return TeacherLogits(logits)
    logprobs, ids = (logits / temperature).log_softmax(-1).topk(K)
    return TeacherTopK(ids, logprobs)


# ---------------------------------------------------------------------------------------------------------------------
# The formula
# ---------------------------------------------------------------------------------------------------------------------


def test_direction_of_the_kls():
    """Three tokens, by hand: forward is KL(teacher || student), reverse is KL(student || teacher)."""
    ps, pt = [0.7, 0.2, 0.1], [0.2, 0.2, 0.6]
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))  # noqa: E731
    student, teacher = (torch.tensor([p], dtype=torch.float64).log() for p in (ps, pt))
    for kind, expected in (("forward_kl", kl(pt, ps)), ("reverse_kl", kl(ps, pt))):
        loss, stats = divergence_from_logits(student, TeacherLogits(teacher), kind=kind)
        assert loss.item() == pytest.approx(expected)
        assert reference_divergence(student, teacher, kind).item() == pytest.approx(expected)
        assert getattr(stats, kind).item() == pytest.approx(expected)
    for jsd_beta in (0.1, 0.5, 0.9):
        m = [(1 - jsd_beta) * a + jsd_beta * b for a, b in zip(ps, pt, strict=True)]
        expected = jsd_beta * kl(pt, m) + (1 - jsd_beta) * kl(ps, m)
        loss, _ = divergence_from_logits(student, TeacherLogits(teacher), kind="jsd", jsd_beta=jsd_beta)
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("how", ["head", "logits", "topk"])
@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
def test_gradcheck(kind, jsd_beta, how, temperature):
    x, head, target = randn(N, HS, grad=True), randn(V, HS, grad=True), randn(N, HT)
    teacher_head = randn(V, HT)
    teacher = make_teacher(how, target, teacher_head, temperature)
    weight = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0, 0.3], dtype=torch.float64)
    options = dict(weight=weight, kind=kind, jsd_beta=jsd_beta, temperature=temperature, workspace_bytes=3 * V * 16)

    assert gradcheck(lambda x, head: fused_linear_divergence(x, head, teacher, **options)[0], (x, head))
    logits = (x @ head.T).detach().requires_grad_()
    assert gradcheck(lambda z: divergence_from_logits(z, teacher, **options)[0], (logits,))

    teacher_logits = target @ teacher_head.T
    if how == "topk":
        expected = reference_divergence(
            *reference_buckets(logits, teacher_logits, teacher.ids, temperature), limit(kind, jsd_beta), jsd_beta
        )
    else:
        expected = reference_divergence(logits, teacher_logits, limit(kind, jsd_beta), jsd_beta, temperature)
    loss, _ = fused_linear_divergence(x, head, teacher, **options)
    torch.testing.assert_close(loss, (weight * expected).sum())
    torch.testing.assert_close(divergence_from_logits(logits, teacher, **options)[0], loss)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats(temperature):
    zs, zt, ids = randn(N, V) * 2, randn(N, V) * 2, torch.randint(V, (N,))
    weight = torch.ones(N, dtype=torch.float64)
    weight[2] = 0
    options = dict(weight=weight, temperature=temperature, target_ids=ids)
    loss, stats = divergence_from_logits(zs, TeacherLogits(zt), **options)
    student_logprob, student_entropy = reference_logprob(zs, ids, temperature)
    teacher_logprob, teacher_entropy = reference_logprob(zt, ids, temperature)
    expected = (
        reference_divergence(zs, zt, "forward_kl", temperature=temperature),
        reference_divergence(zs, zt, "reverse_kl", temperature=temperature),
        student_entropy, teacher_entropy, student_logprob, teacher_logprob,
    )  # fmt: skip
    for value, reference in zip(stats, expected, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, weight * reference)
    assert divergence_from_logits(zs, TeacherLogits(zt))[1].student_logprob is None


def test_topk_stats():
    zs, zt = randn(N, V), randn(N, V)
    logprobs, ids = zt.log_softmax(-1).topk(K)
    target = torch.stack((ids[0, 2], zt[1].argmin(), *ids[2:, 0]))  # row 1: an id outside its K
    _, stats = divergence_from_logits(zs, TeacherTopK(ids, logprobs), target_ids=target)
    us, ut = reference_buckets(zs, zt, ids)
    torch.testing.assert_close(stats.reverse_kl, reference_divergence(us, ut, "reverse_kl"))
    torch.testing.assert_close(stats.forward_kl, reference_divergence(us, ut, "forward_kl"))
    torch.testing.assert_close(stats.student_entropy, reference_logprob(zs, target)[1])  # of the whole vocabulary
    torch.testing.assert_close(stats.student_logprob, reference_logprob(zs, target)[0])
    torch.testing.assert_close(stats.teacher_entropy, reference_logprob(ut, target * 0)[1])  # of the K + 1 outcomes
    assert stats.teacher_logprob[0] == logprobs[0, 2]
    torch.testing.assert_close(stats.teacher_logprob[1], ut[1, K])


@pytest.mark.parametrize(("kind", "jsd_beta"), [*KINDS, (lambda *log_p: own_kl(*log_p), 0.5)])
def test_topk_of_every_id_is_the_divergence_itself(kind, jsd_beta):
    zs, zt = randn(N, V, grad=True), randn(N, V)
    ids = torch.stack([torch.randperm(V) for _ in range(N)])
    teacher = TeacherTopK(ids, zt.log_softmax(-1).gather(1, ids))
    losses = [divergence_from_logits(zs, t, kind=kind, jsd_beta=jsd_beta)[0] for t in (teacher, TeacherLogits(zt))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, zs)[0] for loss in losses))


def test_topk_does_not_reward_an_empty_top():
    """Without the tail bucket, moving the student's mass out of the K ids would bring the reverse KL below 0."""
    logprobs, ids = randn(1, V).log_softmax(-1).topk(K)
    inside = torch.full((1, V), -20.0, dtype=torch.float64).scatter(1, ids, logprobs)
    outside = torch.zeros(1, V, dtype=torch.float64).scatter(1, ids, -30.0)
    values = [divergence_from_logits(z, TeacherTopK(ids, logprobs))[0].item() for z in (inside, outside)]
    assert 0 < values[0] < values[1]


def test_topk_with_all_mass_in_the_top_is_finite():
    """In fp32 a teacher's K probabilities can add up to 1 or more: its tail is then a rounding error, not 0."""
    zs = randn(2, V, dtype=torch.float32, grad=True)
    teacher = TeacherTopK(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.5, 0.5], [0.6, 0.40001]]).log())
    for kind, jsd_beta in KINDS:
        loss, _ = divergence_from_logits(zs, teacher, kind=kind, jsd_beta=jsd_beta)
        assert loss.isfinite() and torch.autograd.grad(loss, zs)[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Edge values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "jsd_beta"), [*KINDS, ("jsd", 0.3), ("jsd", 0.7)])
def test_identical_models_give_exactly_zero(kind, jsd_beta, temperature):
    x, head = randn(N, HS, dtype=torch.float32, grad=True), randn(1000, HS, dtype=torch.float32, grad=True)
    teacher = TeacherHead(x.detach().clone(), head.detach().clone())
    loss, stats = fused_linear_divergence(x, head, teacher, kind=kind, jsd_beta=jsd_beta, temperature=temperature)
    loss.backward()
    assert loss == 0 and (stats.forward_kl == 0).all() and (stats.reverse_kl == 0).all()
    assert (x.grad == 0).all() and (head.grad == 0).all()


def edge_logits():
    """name -> (student, teacher, infinite KLs): fp32 logits (1, 8)."""
    zs, zt = randn(2, 1, 8, dtype=torch.float32).unbind(0)

    def put(z, values):
        z = z.clone()
        for i, value in values.items():
            z[0, i] = value
        return z

    return {
        "-inf in both": (put(zs, {1: -INF, 4: -INF}), put(zt, {1: -INF, 4: -INF}), ()),
        "-inf in the teacher": (zs, put(zt, {2: -INF}), ("reverse_kl",)),
        "-inf in the student": (put(zs, {2: -INF}), zt, ("forward_kl",)),
        "-inf in the teacher where the student underflows": (put(zs, {2: -300.0}), put(zt, {2: -INF}), ()),
        "-inf first": (put(zs, dict.fromkeys(range(7), -INF)), put(zt, dict.fromkeys(range(7), -INF)), ()),
        "student underflows": (put(zs, {3: -200.0}), zt, ()),
        "teacher underflows": (zs, put(zt, {3: -200.0}), ()),
        "both underflow": (put(zs, {3: -200.0}), put(zt, {3: -150.0}), ()),
        "disjoint": (put(zs, {0: 150.0}), put(zt, {1: 150.0}), ()),
        "spike": (put(zs, {0: 3e4}), put(zt, {0: 3e4}), ()),
        "spike in the student": (put(zs, {0: 3e4}), zt, ()),
        "spike in the teacher": (zs, put(zt, {0: 3e4}), ()),
    }


@pytest.mark.parametrize("name", edge_logits())
@pytest.mark.parametrize(("kind", "jsd_beta"), KINDS)
def test_edge_values(name, kind, jsd_beta):
    zs, zt, infinite = edge_logits()[name]
    zs.requires_grad_()
    loss, stats = divergence_from_logits(zs, TeacherLogits(zt), kind=kind, jsd_beta=jsd_beta)
    for field in ("forward_kl", "reverse_kl"):
        expected = reference_divergence(zs, zt, field).float()
        if field in infinite:
            expected = torch.tensor([INF])
        if name == "-inf in the teacher where the student underflows" and field == "reverse_kl":
            expected = getattr(stats, field)  # e^-300 is 0 in fp32 and not in the reference: inf there
            assert expected.isfinite()
        # a logit of 3e4 is itself only known to 2e-3
        atol = 4e-3 if "spike" in name else 1e-6
        torch.testing.assert_close(getattr(stats, field), expected, rtol=1e-5, atol=atol)
    assert stats.student_entropy.isfinite() and stats.teacher_entropy.isfinite()
    grad = torch.autograd.grad(loss, zs)[0]
    if limit(kind, jsd_beta) in infinite:
        assert loss.isinf()
    else:
        torch.testing.assert_close(loss, getattr(stats, limit(kind, jsd_beta), [loss])[0])
        assert loss.isfinite() and grad.isfinite().all()
        if "-inf" not in name:  # the reference's own gradient is nan at -inf
            reference_zs = zs.detach().double().requires_grad_()
            reference_divergence(reference_zs, zt, limit(kind, jsd_beta), jsd_beta).sum().backward()
            atol = 1e-4 if "spike" in name else 1e-6
            torch.testing.assert_close(grad, reference_zs.grad.float(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("vocab", [1, 1000, 151669])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_sizes(rows, vocab):
    """fp32 against the reference, value and gradient, for every kind at once."""
    x, head = randn(rows, 8, dtype=torch.float32, grad=True), randn(vocab, 8, dtype=torch.float32, grad=True)
    teacher = TeacherHead(randn(rows, 4, dtype=torch.float32), randn(vocab, 4, dtype=torch.float32))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        loss, stats = fused_linear_divergence(x, head, teacher, kind=kind, target_ids=torch.zeros(rows).long())
        grads = torch.autograd.grad(loss, (x, head))
        x64, head64 = (t.detach().double().requires_grad_() for t in (x, head))
        z64 = x64 @ head64.T
        expected = reference_divergence(z64, (teacher.hidden.double() @ teacher.weight.double().T), kind).sum()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        assert loss.dtype == torch.float32 and all(len(s) == rows for s in stats)
        for grad, reference in zip(grads, torch.autograd.grad(expected, (x64, head64)), strict=True):
            assert (grad - reference).norm() <= 2e-4 * max(reference.norm(), 1)


def test_small_divergences_keep_their_digits():
    """A student close to its teacher, as late in distillation: KL about 3e-5, and the gradient with it."""
    zt = 3 * randn(8, 5000, dtype=torch.float32)
    zs = (zt + 0.01 * torch.randn_like(zt)).requires_grad_()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        loss, stats = divergence_from_logits(zs, TeacherLogits(zt), kind=kind)
        grad = torch.autograd.grad(loss, zs)[0].double()
        reference_zs = zs.detach().double().requires_grad_()
        expected = reference_divergence(reference_zs, zt, kind).sum()
        reference_grad = torch.autograd.grad(expected, reference_zs)[0]
        assert abs(loss - expected) < 1e-2 * expected
        assert (grad - reference_grad).norm() < 1e-4 * reference_grad.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Weights, chunks, shapes, dtypes
# ---------------------------------------------------------------------------------------------------------------------


def test_chunks_do_not_change_the_result():
    rows = 300
    x, head = randn(rows, HS, grad=True), randn(V, HS, grad=True)
    weight = torch.rand(rows, dtype=torch.float64) * (torch.rand(rows) < 0.8)
    ids = torch.randint(V, (rows,))
    for how in ("head", "logits", "topk"):
        teacher = make_teacher(how, randn(rows, HT), randn(V, HT))
        results = []
        for chunk in (1, 7, 128, 130, 299, 1000):  # one row, tails, a multiple of 128, one chunk
            options = dict(weight=weight, target_ids=ids, workspace_bytes=chunk * V * 16)
            loss, stats = fused_linear_divergence(x, head, teacher, **options)
            results.append((loss, *stats, *torch.autograd.grad(loss, (x, head))))
        for result in results[:-1]:
            for value, expected in zip(result, results[-1], strict=True):
                torch.testing.assert_close(value, expected)


def test_blocks_do_not_change_the_result(monkeypatch):
    x, head, teacher = randn(N, HS, grad=True), randn(V, HS, grad=True), TeacherHead(randn(N, HT), randn(V, HT))
    ids = torch.randint(V, (N,))

    def everything():
        loss, stats = fused_linear_divergence(x, head, teacher, target_ids=ids)
        logprobs, entropy = fused_linear_logprob(x, head, ids)
        return [loss, *stats, logprobs, entropy, *torch.autograd.grad(loss + (logprobs * entropy).sum(), (x, head))]

    whole = everything()
    for rows in (1, 4):
        monkeypatch.setitem(kernels.divergence_torch.BLOCK_ELEMENTS, "cpu", rows * V)
        for value, expected in zip(everything(), whole, strict=True):
            torch.testing.assert_close(value, expected)


def test_rows_per_chunk():
    cpu = torch.device("cpu")
    for n in (1, 127, 128, 129, 1000, 8192):
        for most in (1, 5, 127, 128, 200, 1024, 10000):
            rows = rows_per_chunk(n, 10, most * 10 + 3, cpu)
            assert 1 <= rows <= max(most, 1)
            assert rows >= n or most < 128 or rows % 128 == 0
            if most < 128:
                assert -(-n // rows) == -(-n // most)  # balanced: no more chunks than needed
    assert rows_per_chunk(0, 10, 100, cpu) == 1
    assert rows_per_chunk(8192, 1519360, None, torch.device("cuda")) == 1024


@pytest.mark.parametrize("rows", [0, N])
def test_nothing_to_learn_from_keeps_a_graph(rows):
    """N = 0 and all-masked: every rank still gets zero gradients to reduce."""
    x, head = randn(rows, HS, grad=True), randn(V, HS, grad=True)
    teacher = TeacherHead(randn(rows, HT), randn(V, HT))
    weight = torch.zeros(rows, dtype=torch.float64)
    loss, stats = fused_linear_divergence(x, head, teacher, weight=weight, target_ids=torch.zeros(rows).long())
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and (head.grad == 0).all()
    assert all((s == 0).all() and len(s) == rows for s in stats)
    x.grad = None
    loss, _ = divergence_from_logits(x @ head.T, TeacherLogits(randn(rows, V)), weight=weight)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_masked_rows_are_not_touched():
    """A masked row may hold anything, nan and inf included."""
    x, head = randn(N, HS), randn(V, HS, grad=True)
    x[1], x[4] = float("nan"), INF
    x.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    loss, _ = fused_linear_divergence(x, head, TeacherHead(randn(N, HT), randn(V, HT)), weight=weight)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and head.grad.isfinite().all()
    assert (x.grad[[1, 4]] == 0).all()


def fused_losses():
    """name -> a scalar of (x, head), one through each autograd function."""
    teacher, ids = TeacherHead(randn(N, HT), randn(V, HT)), torch.randint(V, (N,))
    return {
        "divergence": lambda x, head: fused_linear_divergence(x, head, teacher)[0],
        "from logits": lambda x, head: divergence_from_logits(x @ head.T, teacher)[0],
        "logprob": lambda x, head: sum(value.sum() for value in fused_linear_logprob(x, head, ids)),
    }


@pytest.mark.parametrize("name", fused_losses())
def test_upstream_gradient_and_retain_graph(name):
    """The first backward gives its gradients away; the next ones start from the inputs again, whatever came before."""
    x, head = randn(N, HS, grad=True), randn(V, HS, grad=True)
    loss = fused_losses()[name](x, head)
    zero = torch.autograd.grad(0 * loss, (x, head), retain_graph=True)
    once = torch.autograd.grad(loss, (x, head), retain_graph=True)
    scaled = torch.autograd.grad(3.7 * loss, (x, head), retain_graph=True)
    (only_head,) = torch.autograd.grad(-loss, head, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(only_head, -once[1])
    for first, second, third, accumulated in zip(zero, once, scaled, (x.grad, head.grad), strict=True):
        assert (first == 0).all() and (second != 0).any()
        torch.testing.assert_close(third, 3.7 * second)
        torch.testing.assert_close(accumulated, 2 * second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_backward_refuses_weights_that_have_changed():
    x, head = randn(N, HS, grad=True), randn(V, HS, grad=True)
    loss = fused_losses()["divergence"](x, head)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        head += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def heads_gradients(monkeypatch):
    """Addresses of the (V, H) tensors that the losses sum the head's gradient in."""
    addresses = []
    reduce_grads = kernels.linear.reduce_grads

    def spy(dlogits, hidden, head, needs_hidden, dhead):
        if dhead is not None and dhead.data_ptr() not in addresses:
            addresses.append(dhead.data_ptr())
        return reduce_grads(dlogits, hidden, head, needs_hidden, dhead)

    for module in (kernels.divergence, kernels.logprob):
        monkeypatch.setattr(module, "reduce_grads", spy)
    return addresses


@pytest.mark.parametrize("name", ["divergence", "logprob"])
def test_the_heads_gradient_is_handed_over_without_a_copy(name, heads_gradients):
    """The largest tensor of all becomes head.grad itself, or what the next function back receives."""
    x, head, loss_of = randn(N, HS), randn(V, HS, grad=True), fused_losses()[name]
    loss_of(x, head).backward()
    assert heads_gradients == [head.grad.data_ptr()]
    once, address = head.grad.clone(), head.grad.data_ptr()
    loss_of(x, head).backward()  # the next micro-batch: added to the gradient that is there
    assert head.grad.data_ptr() == address
    torch.testing.assert_close(head.grad, 2 * once)


@pytest.mark.parametrize("name", ["divergence", "logprob"])
def test_a_head_gathered_from_shards_passes_its_gradient_on(name, heads_gradients):
    """As an unsharded FSDP2 head: no leaf, so the same tensor goes to the function that gathered it."""
    received = []

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, shard):
            return torch.cat((shard, shard))

        @staticmethod
        def backward(ctx, grad):
            received.append(grad.data_ptr())
            return grad[:V] + grad[V:]

    x, shard, loss_of = randn(N, HS), randn(V, HS, grad=True), fused_losses()[name]
    (grad,) = torch.autograd.grad(loss_of(x, Gather.apply(shard)), shard)
    assert received == heads_gradients
    (expected,) = torch.autograd.grad(loss_of(x, torch.cat((shard, shard))), shard)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", fused_losses())
def test_differentiating_twice_is_refused(name):
    x, head = randn(N, HS, grad=True), randn(V, HS, grad=True)
    loss = fused_losses()[name](x, head)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss + (x**2).sum(), x, create_graph=True)


def test_only_what_requires_grad_is_computed(monkeypatch):
    teacher = TeacherHead(randn(N, HT), randn(V, HT))
    calls = []
    reduce_grads = kernels.divergence.reduce_grads

    def spy(dlogits, hidden, head, needs_hidden, dhead):
        calls.append((needs_hidden, dhead is not None))
        return reduce_grads(dlogits, hidden, head, needs_hidden, dhead)

    monkeypatch.setattr(kernels.divergence, "reduce_grads", spy)
    results = {}
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.manual_seed(1)
        x, head = randn(N, HS, grad=needs[0]), randn(V, HS, grad=needs[1])
        loss, _ = fused_linear_divergence(x, head, teacher)
        if any(needs):
            loss.backward()
        assert loss.requires_grad == any(needs)
        results[needs] = x.grad, head.grad
    assert calls == [(True, True), (True, False), (False, True)]
    torch.testing.assert_close(results[True, False][0], results[True, True][0])
    torch.testing.assert_close(results[False, True][1], results[True, True][1])
    with torch.no_grad():
        assert not fused_linear_divergence(x.requires_grad_(), head, teacher)[0].requires_grad
    assert len(calls) == 3


def test_backward_does_not_enter_the_teachers_graph():
    """A teacher that ran without no_grad is still a constant."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            raise AssertionError("the teacher was differentiated")

    x, head, target, teacher_head = randn(N, HS, grad=True), randn(V, HS), randn(N, HT, grad=True), randn(V, HT)
    for teacher in (TeacherHead(Poison.apply(target), teacher_head), TeacherLogits(Poison.apply(target) @ teacher_head.T)):
        fused_linear_divergence(x, head, teacher)[0].backward()


def test_tied_head():
    """The embedding is the head: autograd adds the gradients of its two uses."""
    embedding, tokens = randn(V, HS, grad=True), torch.randint(V, (N,))
    teacher_logits = randn(N, V)

    def loss():
        return fused_linear_divergence(torch.tanh(embedding[tokens]), embedding, TeacherLogits(teacher_logits))[0]

    expected = reference_divergence(torch.tanh(embedding[tokens]) @ embedding.T, teacher_logits, "reverse_kl").sum()
    (reference,) = torch.autograd.grad(expected, embedding)
    torch.testing.assert_close(torch.autograd.grad(loss(), embedding)[0], reference)
    for _ in range(2):  # two micro-batches into one .grad
        (3 * loss()).backward()
    torch.testing.assert_close(embedding.grad, 6 * reference)


@pytest.mark.parametrize("extra", [-3, 3])
def test_vocabularies_that_differ_by_padding(extra):
    x, head, target, teacher_head = randn(N, HS, grad=True), randn(V, HS, grad=True), randn(N, HT), randn(V + extra, HT)
    shared = min(V, V + extra)
    expected = reference_divergence((x @ head.T)[:, :shared], (target @ teacher_head.T)[:, :shared], "reverse_kl").sum()
    reference = torch.autograd.grad(expected, (x, head))
    for teacher in (TeacherHead(target, teacher_head), TeacherLogits(target @ teacher_head.T)):
        loss, _ = fused_linear_divergence(x, head, teacher, workspace_bytes=2 * V * 16)
        torch.testing.assert_close(loss, expected)
        for grad, reference_grad in zip(torch.autograd.grad(loss, (x, head)), reference, strict=True):
            torch.testing.assert_close(grad, reference_grad)
        logits = (x @ head.T).detach().requires_grad_()
        loss, _ = divergence_from_logits(logits, teacher)
        torch.testing.assert_close(loss, expected)
        assert (torch.autograd.grad(loss, logits)[0][:, shared:] == 0).all()


def test_rows_that_are_not_contiguous():
    x, head = randn(2 * N, HS, grad=True), randn(HS, V, grad=True)
    target, teacher_head = randn(HT, N), randn(V, 2 * HT)
    weight = torch.rand(2 * N, dtype=torch.float64)
    loss, _ = fused_linear_divergence(
        x[::2], head.T, TeacherHead(target.T, teacher_head[:, ::2]), weight=weight[::2], workspace_bytes=4 * V * 16
    )
    expected = weight[::2] * reference_divergence(x[::2] @ head, target.T @ teacher_head[:, ::2].T, "reverse_kl")
    torch.testing.assert_close(loss, expected.sum())
    for value, reference in zip(*(torch.autograd.grad(v, (x, head)) for v in (loss, expected.sum())), strict=True):
        torch.testing.assert_close(value, reference)

    logits = randn(N, 2 * V, grad=True)
    for view in (logits[:, ::2], logits[:, :V], logits.view(2 * N, V)[1::2]):
        loss, _ = divergence_from_logits(view, TeacherLogits(view.detach().flip(0)))
        expected = reference_divergence(view, view.detach().flip(0), "reverse_kl").sum()
        torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (loss, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_inputs_keep_fp32_logits(dtype, autocast):
    """The result is that of the rounded inputs in fp32; only the gradients come back rounded."""
    x, head = (randn(*shape, dtype=dtype, grad=True) for shape in ((N, HS), (V, HS)))
    teacher = TeacherHead(randn(N, HT, dtype=dtype), randn(V, HT, dtype=torch.float32))
    x32, head32 = (t.detach().float().requires_grad_() for t in (x, head))
    ids = torch.randint(V, (N,))

    def everything(x, head, teacher):
        loss, stats = fused_linear_divergence(x, head, teacher, target_ids=ids)
        logprobs, entropy = fused_linear_logprob(x, head, ids)
        return loss, *stats, logprobs, entropy

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values = everything(x, head, teacher)
    expected = everything(x32, head32, TeacherHead(teacher.hidden.float(), teacher.weight))
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference)
    (values[0] + values[-2].sum() + values[-1].sum()).backward()
    (expected[0] + expected[-2].sum() + expected[-1].sum()).backward()
    for value, reference in ((x.grad, x32.grad), (head.grad, head32.grad)):
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), reference, rtol=0.02, atol=0.02)


def test_mixed_dtypes():
    """A float32 student beside a float64 teacher, and the other way round: the student's dtype decides."""
    target, teacher_head = randn(N, HT), randn(V, HT)
    for dtype in (torch.float32, torch.float64):
        x, head = randn(N, HS, dtype=dtype, grad=True), randn(V, HS, dtype=dtype)
        for teacher in (TeacherHead(target, teacher_head), TeacherHead(target.float(), teacher_head.float())):
            loss, stats = fused_linear_divergence(x, head, teacher)
            assert loss.dtype == stats.reverse_kl.dtype == torch.autograd.grad(loss, x)[0].dtype == dtype


def test_what_a_caller_can_get_wrong():
    x, head, teacher = randn(N, HS), randn(V, HS), TeacherHead(randn(N, HT), randn(V, HT))
    wrong = [
        (dict(kind="kl"), "forward_kl, reverse_kl, jsd"),
        (dict(kind="jsd", jsd_beta=1.5), "between 0"),
        (dict(temperature=0.0), "positive"),
        (dict(weight=torch.ones(N - 1)), f"weight has {N - 1} rows"),
        (dict(weight=torch.ones(N, requires_grad=True)), "detach"),
        (dict(target_ids=torch.zeros(N + 1).long()), f"target_ids has {N + 1} rows"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            fused_linear_divergence(x, head, teacher, **options)
        with pytest.raises(ValueError, match=message):
            divergence_from_logits(x @ head.T, teacher, **options)
    with pytest.raises(ValueError, match="TeacherHead"):
        fused_linear_divergence(x, head, (teacher.hidden, teacher.weight))
    with pytest.raises(ValueError, match="logprobs"):
        fused_linear_divergence(x, head, TeacherTopK(torch.zeros(N, 3).long(), torch.zeros(N, 2)))
    with pytest.raises(ValueError, match="teacher has"):
        fused_linear_divergence(x[:2], head, teacher)
    with pytest.raises(ValueError, match="positive"):
        fused_linear_logprob(x, head, torch.zeros(N).long(), temperature=-1.0)
    with pytest.raises(ValueError, match="shape"):
        fused_linear_logprob(x, head, torch.zeros(N, 1).long())


def test_head_weight():
    def model(bias=False, **config):
        head = torch.nn.Linear(HS, V, bias=bias)
        return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(**config), head=head)

    plain = model(final_logit_softcapping=None, logit_scale=1.0)
    assert head_weight(plain) is plain.head.weight
    for other in (model(bias=True), model(final_logit_softcapping=30.0), model(logits_scaling=8.0)):
        with pytest.raises(ValueError, match="divergence_from_logits"):
            head_weight(other)


# ---------------------------------------------------------------------------------------------------------------------
# A divergence of the caller's own
# ---------------------------------------------------------------------------------------------------------------------


def own_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def own_jsd(log_ps, log_pt, jsd_beta):
    log_m = torch.logaddexp(log_ps + math.log1p(-jsd_beta), log_pt + math.log(jsd_beta))
    return jsd_beta * own_kl(log_pt, log_m) + (1 - jsd_beta) * own_kl(log_ps, log_m)


def skewed_reverse_kl(log_ps, log_pt, skew=0.1):
    """KL(p_s || (1 - skew) p_t + skew p_s)."""
    return own_kl(log_ps, torch.logaddexp(log_pt + math.log1p(-skew), log_ps + math.log(skew)))


OWN_KINDS = {
    ("forward_kl", 0.5): lambda log_ps, log_pt: own_kl(log_pt, log_ps),
    ("reverse_kl", 0.5): own_kl,
    ("jsd", 0.5): partial(own_jsd, jsd_beta=0.5),
    ("jsd", 0.1): partial(own_jsd, jsd_beta=0.1),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two rows, in chunks that workspace_bytes sets."""
    monkeypatch.setitem(kernels.divergence_torch.BLOCK_ELEMENTS, "cpu", 2 * V)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("how", "extra"), [*itertools.product(("head", "logits"), (-3, 0, 3)), ("topk", 0), ("topk", -3)])
def test_own_kind_against_naive_autograd(how, temperature, extra, small_blocks):
    """The skewed reverse KL: gradcheck, and value and gradient of the full-vocabulary formula. V' != V, weights of 0."""
    x, head, target = randn(N, HS, grad=True), randn(V, HS, grad=True), randn(N, HT)
    teacher_head, shared = randn(V + extra, HT), min(V, V + extra)
    teacher = make_teacher(how, target, teacher_head, temperature)
    weight = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0, 0.3], dtype=torch.float64)
    options = dict(weight=weight, kind=skewed_reverse_kl, temperature=temperature, workspace_bytes=3 * V * 16)
    logits = (x @ head.T).detach().requires_grad_()
    assert gradcheck(lambda x, head: fused_linear_divergence(x, head, teacher, **options)[0], (x, head))
    assert gradcheck(lambda z: divergence_from_logits(z, teacher, **options)[0], (logits,))

    if how == "topk":
        _, ut = reference_buckets(randn(N, V + extra), target @ teacher_head.T, teacher.ids, temperature)
        us, _ = reference_buckets(x @ head.T, randn(N, V), teacher.ids, temperature)
    else:
        zs, zt = x @ head.T / temperature, target @ teacher_head.T / temperature
        us, ut = (z[:, :shared].log_softmax(-1) for z in (zs, zt))
    expected = (weight * skewed_reverse_kl(us, ut)).sum()
    loss, _ = fused_linear_divergence(x, head, teacher, **options)
    torch.testing.assert_close(loss, expected)
    for value, reference in zip(*(torch.autograd.grad(v, (x, head)) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(value, reference)
    torch.testing.assert_close(divergence_from_logits(logits, teacher, **options)[0], loss)


@pytest.mark.parametrize("how", ["head", "logits", "topk"])
@pytest.mark.parametrize(("kind", "jsd_beta"), OWN_KINDS)
def test_own_kind_equals_the_built_in_one(kind, jsd_beta, how, small_blocks):
    """Loss, statistics, both gradients, and the gradient of a further backward through a retained graph."""
    x, head, teacher = randn(N, HS, grad=True), randn(V, HS, grad=True), make_teacher(how, randn(N, HT), randn(V, HT))
    options = dict(
        weight=torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0, 0.3], dtype=torch.float64), temperature=0.7, jsd_beta=jsd_beta,
        target_ids=torch.randint(V, (N,)), workspace_bytes=3 * V * 16,
    )  # fmt: skip
    results = []
    for chosen in (kind, OWN_KINDS[kind, jsd_beta]):
        loss, stats = fused_linear_divergence(x, head, teacher, kind=chosen, **options)
        first = torch.autograd.grad(loss, (x, head), retain_graph=True)
        results.append((loss, *stats, *first, *torch.autograd.grad(3.7 * loss, (x, head))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)


def test_own_kind_does_not_depend_on_chunks_and_blocks(monkeypatch):
    rows = 300
    x, head, teacher = randn(rows, HS, grad=True), randn(V, HS, grad=True), TeacherHead(randn(rows, HT), randn(V, HT))
    weight = torch.rand(rows, dtype=torch.float64) * (torch.rand(rows) < 0.8)
    results = []
    for chunk, block in ((1000, 1000), (1, 1), (7, 3), (130, 50)):
        monkeypatch.setitem(kernels.divergence_torch.BLOCK_ELEMENTS, "cpu", block * V)
        options = dict(weight=weight, kind=skewed_reverse_kl, workspace_bytes=chunk * V * 16)
        loss, stats = fused_linear_divergence(x, head, teacher, **options)
        results.append((loss, *stats[:4], *torch.autograd.grad(loss, (x, head))))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", edge_logits())
@pytest.mark.parametrize(("kind", "jsd_beta"), OWN_KINDS)
def test_own_kind_at_edge_values(name, kind, jsd_beta):
    """As the built-in kind where that is finite, and large where it is not."""
    zs, zt, infinite = edge_logits()[name]
    zs.requires_grad_()
    loss, _ = divergence_from_logits(zs, TeacherLogits(zt), kind=OWN_KINDS[kind, jsd_beta])
    expected, _ = divergence_from_logits(zs, TeacherLogits(zt), kind=kind, jsd_beta=jsd_beta)
    if kind in infinite:
        assert expected.isinf() and loss > 1e15
    else:
        spike = "spike" in name  # a logit of 3e4 is itself only known to 2e-3
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=4e-3 if spike else 1e-6)
        grads = (torch.autograd.grad(v, zs)[0] for v in (loss, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 if spike else 1e-6)


def test_own_kind_never_sees_the_padding_of_a_gpus_buffers(monkeypatch):
    """On CUDA our buffers have columns of -inf for Triton; a caller's function counts on V columns."""

    def padded(rows, vocab, dtype, device):
        return torch.full((rows, vocab + 3), -INF, dtype=dtype, device=device)

    x, head, target, teacher_head = randn(N, HS, grad=True), randn(V, HS, grad=True), randn(N, HT), randn(V, HT)
    mean_square = lambda log_ps, log_pt: (log_ps - log_pt).square().mean(-1)  # noqa: E731
    results = []
    for buffers in (None, padded):
        if buffers:
            monkeypatch.setattr(kernels.divergence, "empty_logits", buffers)
        for teacher in (TeacherHead(target, teacher_head), TeacherLogits(target @ teacher_head.T)):
            loss, _ = fused_linear_divergence(x, head, teacher, kind=mean_square)
            results.append((loss, *torch.autograd.grad(loss, (x, head))))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected)


def test_own_kind_in_fp32_from_bf16_and_without_gradients():
    x, head = (randn(*shape, dtype=torch.bfloat16, grad=True) for shape in ((N, HS), (V, HS)))
    teacher, dtypes = TeacherHead(randn(N, HT, dtype=torch.bfloat16), randn(V, HT)), []

    def spy(log_ps, log_pt):
        dtypes.extend((log_ps.dtype, log_pt.dtype))
        return own_kl(log_ps, log_pt).double()  # its own dtype does not matter

    loss, _ = fused_linear_divergence(x, head, teacher, kind=spy)
    expected, _ = fused_linear_divergence(x, head, teacher)
    torch.testing.assert_close(loss, expected)
    for value, reference in zip(*(torch.autograd.grad(v, (x, head)) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(value, reference)
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            loss, _ = fused_linear_divergence(x, head, teacher, kind=spy)
        torch.testing.assert_close(loss, expected.detach())
    assert set(dtypes) == {torch.float32} and not loss.requires_grad


def test_own_kind_that_returns_something_else():
    x, head, teacher = randn(N, HS, grad=True), randn(V, HS), TeacherHead(randn(N, HT), randn(V, HT))
    wrong = [
        (lambda log_ps, log_pt: log_ps - log_pt, rf"into \({N},\); it returned \({N}, {V}\)"),
        (lambda log_ps, log_pt: (log_ps - log_pt).sum(-1, keepdim=True), rf"it returned \({N}, 1\)"),
        (lambda log_ps, log_pt: (log_ps - log_pt).mean(), r"it returned \(\)"),
        (lambda log_ps, log_pt: None, "it returned NoneType"),
        (lambda log_ps, log_pt: own_kl(log_ps, log_pt).detach(), "does not depend on log_p_student"),
    ]
    for kind, message in wrong:
        with pytest.raises(ValueError, match=message):
            fused_linear_divergence(x, head, teacher, kind=kind)


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operations make while it is active, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)]
        return out


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", skewed_reverse_kl])
def test_nothing_of_all_tokens_logits_is_allocated(kind, monkeypatch):
    rows, vocab = 60, 1000
    monkeypatch.setitem(kernels.divergence_torch.BLOCK_ELEMENTS, "cpu", 2 * vocab)
    x, head = randn(rows, HS, grad=True), randn(vocab, HS, grad=True)
    teacher = TeacherHead(randn(rows, HT), randn(vocab, HT))
    with Allocations() as allocations:
        fused_linear_divergence(x, head, teacher, kind=kind, workspace_bytes=10 * vocab * 16)[0].backward()
    assert max(allocations.sizes) == 10 * vocab  # one chunk's logits
    with Allocations() as allocations:
        own_kl((x @ head.T).log_softmax(-1), (teacher.hidden @ teacher.weight.T).log_softmax(-1)).sum().backward()
    assert max(allocations.sizes) == rows * vocab  # it does see one


@pytest.mark.parametrize("name", ["divergence", "logprob"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_has_no_gradient_in_memory(name, frozen):
    """A body that is trained under a frozen head, as with adapters: no (V, H) tensor is made, its product not computed."""
    rows, vocab, hidden = 4, 50, 300  # the head is larger than all the logits together
    x, head, ids = randn(rows, hidden, grad=True), randn(vocab, hidden, grad=not frozen), torch.randint(vocab, (rows,))
    teacher = TeacherLogits(randn(rows, vocab))
    with Allocations() as allocations:
        if name == "divergence":
            fused_linear_divergence(x, head, teacher)[0].backward()
        else:
            sum(value.sum() for value in fused_linear_logprob(x, head, ids)).backward()
    assert x.grad is not None and (head.grad is None) == frozen
    assert (max(allocations.sizes) >= vocab * hidden) == (not frozen)
    assert not frozen or max(allocations.sizes) == rows * hidden  # dX


# ---------------------------------------------------------------------------------------------------------------------
# fused_linear_logprob
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_gradcheck(temperature):
    x, head, ids = randn(N, HS, grad=True), randn(V, HS, grad=True), torch.randint(V, (N,))
    options = dict(temperature=temperature, workspace_bytes=4 * V * 16)
    logprobs = lambda x, head: fused_linear_logprob(x, head, ids, **options)  # noqa: E731
    assert gradcheck(logprobs, (x, head))
    assert gradcheck(lambda x, head: logprobs(x, head)[0], (x, head))
    assert gradcheck(lambda x, head: logprobs(x, head)[1], (x, head))
    expected = reference_logprob(x @ head.T, ids, temperature)
    for value, reference in zip(logprobs(x, head), expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_logprob_chunks_masks_and_frozen_sides():
    rows = 300
    x, head, ids = randn(rows, HS, grad=True), randn(V, HS, grad=True), torch.randint(V, (rows,))
    g, h = randn(rows), randn(rows)
    g[::3] = 0

    def grads(inputs, chunk):
        logprobs, entropy = fused_linear_logprob(x, head, ids, workspace_bytes=chunk * V * 16)
        return torch.autograd.grad((g * logprobs + h * entropy).sum(), inputs)

    logprobs, entropy = reference_logprob(x @ head.T, ids)
    expected = torch.autograd.grad((g * logprobs + h * entropy).sum(), (x, head))
    for chunk in (1, 7, 128, 1000):
        for value, reference in zip(grads((x, head), chunk), expected, strict=True):
            torch.testing.assert_close(value, reference)
    torch.testing.assert_close(grads(x, 128)[0], expected[0])
    head.requires_grad_(False)
    torch.testing.assert_close(grads(x, 128)[0], expected[0])
    x.requires_grad_(False)
    assert not fused_linear_logprob(x, head, ids)[0].requires_grad


def test_logprob_edge_values():
    """Hidden states and heads that give logits of -inf and a spike of 3e4; N = 0; V = 1."""
    head = torch.eye(4, requires_grad=True)
    x = torch.tensor([[3e4, 0.0, 1.0, 2.0], [-200.0, 0.0, 1.0, 2.0]], requires_grad=True)
    logprobs, entropy = fused_linear_logprob(x, head, torch.tensor([0, 0]))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs[0] == 0 and entropy[0] == 0 and logprobs[1] < -200
    assert x.grad.isfinite().all() and head.grad.isfinite().all()

    from kernels.logprob import torch_grad, torch_stats

    z = torch.tensor([[-INF, 0.5, 1.0, -INF]])
    log_z, entropy = torch_stats(z, 1.0)
    assert log_z.isfinite() and entropy.isfinite()
    dz = torch.empty_like(z)
    torch_grad(z, torch.tensor([[1]]), log_z, entropy, torch.ones(1, 1), torch.ones(1, 1), 1.0, dz)
    assert dz.isfinite().all() and dz[0, 0] == 0

    for rows, vocab in ((0, 4), (2, 1)):
        x, head = torch.randn(rows, 3, requires_grad=True), torch.randn(vocab, 3, requires_grad=True)
        logprobs, entropy = fused_linear_logprob(x, head, torch.zeros(rows).long())
        (logprobs.sum() + entropy.sum()).backward()
        assert (logprobs == 0).all() and (entropy == 0).all() and (head.grad == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_no_import_circle():
    """Imports inside functions count too."""
    imports = {}
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        names = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        imports[f"kernels.{path.stem}"] = {name for name in names if name.startswith("kernels")}
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError
    assert set(order) == set(imports) and order.index("kernels.divergence_triton") < order.index("kernels.divergence")


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own
# ---------------------------------------------------------------------------------------------------------------------


def run_script(name, *flags, folder="tests", **env):
    path = os.pathsep.join((str(ROOT), os.getenv("PYTHONPATH", "")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
    command = [sys.executable, str(ROOT / folder / name), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_triton
def test_triton_leaves_in_the_interpreter():
    run_script("kernels_interpret.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_triton_kernels_compile_without_spills_and_with_vector_loads():
    run_script("kernels_aot.py")


@needs_cuda
def test_cuda_equals_the_reference():
    run_script("kernels_cuda.py")


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """14,200 rows of 151,936 columns: one row in memory, repeated with stride 0, so the logits need none."""
    run_script("kernels_overflow.py")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    run_script("kernels_peak.py")


@pytest.mark.slow
def test_two_fsdp2_ranks_equal_one_process():
    run_script("kernels_fsdp.py")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("frozen", [False, True])
def test_benchmark_prints_a_table_and_a_json_line(frozen):
    sizes = "--device cpu --tokens 300 --vocab 20000 --student-hidden 8 --teacher-hidden 16 --workspace-mb 2 --rounds 1"
    chosen = "--kinds jsd --contestants ours naive products" + " --frozen-head" * frozen
    *table, line = run_script("kernels.py", *sizes.split(), *chosen.split(), folder="benchmarks").splitlines()
    ours, naive, products = json.loads(line)["results"]
    assert [r["name"] for r in (ours, naive, products)] == ["ours", "naive", "products"]
    assert len(ours["errors"]) == len(naive["errors"]) == (1 if frozen else 2) and max(ours["errors"]) < 1e-4
    assert 0 < ours["memory_mb"] < naive["memory_mb"] / 2 and ours["ms"] > products["ms"] > 0
    columns = {row.count("|") for row in table if row.startswith("|")}
    assert columns == {11}
