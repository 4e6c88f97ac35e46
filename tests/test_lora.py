"""--lora-rank: what adapters compute and how they learn, what a run saves and resumes, and that samplers, ranks and the plan
see the model that trains."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import conftest
import pytest
import torch
import tyro
from conftest import ROOT, FakeGrader, load, planned_and_used, random_model, read_jsonl, saved_activations
from safetensors.torch import load_file
from test_parallel import SMALL, TIMES, difference, interrupted, jobs, torchrun
from test_plan import hub  # noqa: F401  (a fixture)
from torch.distributed.checkpoint import FileSystemReader

import common
import grpo
import toy
from infra import lora, models, plan
from infra.cli import UsageError
from infra.sampler_hf import HFSampler

IDS = torch.randint(0, 20, (3, 11), generator=torch.Generator().manual_seed(0))
GRPO = SMALL | {"prompts_per_step": 6, "minibatch_prompts": 3, "group_size": 3, "lora_rank": 4, "learning_rate": 0.01}


def with_adapters(rank=4, dtype=torch.float32, learned=True, **config):
    """A random model with adapters; `learned` ones are no longer 0."""
    model = lora.inject(random_model(**config).to(dtype), rank, 8, seed=3)
    with torch.no_grad():
        for _, layer in lora.adapted(model) if learned else []:
            layer.lora_B.default.weight.normal_(std=0.1)
    return model


def logits(model):
    with torch.no_grad(), models.autocast(model.device, model.dtype):
        return model(input_ids=IDS).logits


SCRIPTS = ["fkl_warmup", "opd", "variants/fkl_weighted", "variants/opd_weighted", "variants/opd_sampled"]
ARCHITECTURES = [{}, {"tied": False}, {"arch": "llama", "attention_bias": True, "mlp_bias": True}]


# ------------------------------------------------------------------------------------------------------- what they compute
@pytest.mark.parametrize("config", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(config, dtype):
    model = random_model(**config).to(dtype)
    before = logits(model)
    lora.inject(model, 4, 32, seed=1)
    assert torch.equal(logits(model), before)
    assert len(lora.adapted(model)) == 2 * 7
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if lora.is_adapter(name)} and len(learns) == 2 * 2 * 7
    assert {p.dtype for _, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for _, p in model.named_parameters() if not p.requires_grad} == {dtype}


def test_the_seed_alone_draws_the_adapters():
    """Not what was drawn before, nor the dtype of the base."""
    first = lora.adapter_state(with_adapters(learned=False))
    second = lora.adapter_state(lora.inject(random_model(seed=9).bfloat16(), 4, 8, seed=3))
    other = lora.adapter_state(lora.inject(random_model(), 4, 8, seed=4))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if ".lora_A." in name]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    for name in drawn:  # uniform within 1 / sqrt(in)
        bound = first[name].shape[1] ** -0.5
        assert 0.9 * bound < float(first[name].abs().max()) <= bound
    model, _ = random_model(), torch.manual_seed(5)
    lora.inject(model, 4, 8, seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "nor does it draw from the stream of all others"


@pytest.mark.parametrize("config", ARCHITECTURES, ids=str)
def test_merged_weights_are_those_of_the_plain_model_and_compute_what_adapters_do(config):
    model, plain = with_adapters(**config), random_model(**config)
    expected, kept = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    assert (expected - logits(plain)).abs().max() > 0.1
    weights = dict(lora.plain_weights(model))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights, strict=config.get("tied", True) is False)
    assert (logits(plain) - expected).abs().max() < 1e-5
    with lora.merged(model, torch.float32):
        assert (logits(model) - expected).abs().max() < 1e-5
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters()), "nothing of the trainer was written to"


def test_with_adapters_off_it_is_the_base():
    model = with_adapters()
    expected = logits(model)
    with lora.adapters_off(model):
        assert torch.equal(logits(model), logits(random_model()))
    assert torch.equal(logits(model), expected)
    with pytest.raises(ZeroDivisionError), lora.merged(model, torch.float32):
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected), "an error within leaves nothing behind"
    plain = random_model()
    with lora.adapters_off(plain), lora.merged(plain, torch.float32):
        assert torch.equal(logits(plain), logits(random_model()))


def test_gradients_and_an_update_are_those_of_full_fine_tuning():
    """With G the gradient of the merged weight W' = W + s B A: B's is s G A^T, and A's s B^T G. Where A's columns are
    orthonormal, as they can be from a rank of the layer's width on, a step of B from 0 moves W' by -lr s^2 G."""
    model = with_adapters(rank=64, dtype=torch.float64)
    scale = 8 / 64

    def loss(one):
        return torch.log_softmax(one(input_ids=IDS).logits, -1)[:, :-1].gather(2, IDS[:, 1:, None]).square().sum()

    def full_gradients():
        plain = random_model().double().requires_grad_()
        plain.load_state_dict(dict(lora.plain_weights(model)), strict=False)
        loss(plain).backward()
        return {name.removesuffix(".weight"): p.grad for name, p in plain.named_parameters()}

    loss(model).backward()
    full = full_gradients()
    for name, layer in lora.adapted(model):
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        torch.testing.assert_close(b.grad, scale * full[name] @ a.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.grad, scale * b.T @ full[name], rtol=1e-9, atol=1e-12)
        assert layer.base_layer.weight.grad is None

    with torch.no_grad():
        for _, layer in lora.adapted(model):
            torch.nn.init.orthogonal_(layer.lora_A.default.weight)
            layer.lora_B.default.weight.zero_()
    model.zero_grad()
    loss(model).backward()
    full, before = full_gradients(), {name: lora.merge(layer) for name, layer in lora.adapted(model)}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, layer in lora.adapted(model):
        moved = lora.merge(layer) - before[name]
        torch.testing.assert_close(moved, -0.1 * scale**2 * full[name], rtol=1e-9, atol=1e-12)


def test_a_decoder_with_matrices_outside_of_linear_layers_is_refused():
    model = random_model()
    model.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UsageError, match=r"--lora-rank: 0.mlp.experts \[2, 3, 4\] of .* belongs to no linear layer"):
        lora.inject(model, 4, 8, seed=1)


# ------------------------------------------------------------------------------------------------------------- a whole run
@pytest.mark.parametrize("base", ["student", "llama"])
def test_either_output_loads_by_itself_with_the_same_logits(run_script, fake_grader, checkpoints, data, base):
    from peft import PeftModel

    fake_grader(FakeGrader.rule)
    path = getattr(checkpoints, base)
    args = GRPO | {"minibatch_prompts": 6, "kl_coef": 0.1, "dtype": "float64"}
    run = run_script("grpo", model=path, train_data=data, **args)
    plain, adapter = load(run.out), json.loads((run.out / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == path and adapter["r"] == 4
    adapted = PeftModel.from_pretrained(load(path), run.out / "adapter")
    assert (logits(plain) - logits(adapted)).abs().max() < 1e-10 < 1e-3 < (logits(plain) - logits(load(path))).abs().max()
    expected, saved = load_file(f"{path}/model.safetensors"), load_file(run.out / "model.safetensors")
    assert expected.keys() == saved.keys()
    learned = {name for name in saved if not torch.equal(saved[name].float(), expected[name])}
    assert learned == {name for name in saved if name.endswith("_proj.weight")}, "all linear layers of the decoder, no other"
    _, gradients = run.updates[0]
    assert gradients and all(map(lora.is_adapter, gradients)), "the frozen head's gradient is left out"
    kls = [row["losses/ref_kl"] for row in run.metrics]
    assert abs(kls[0]) < 1e-6 < 1e-3 < kls[-1], "the reference is the policy's base"
    assert not (run.out / "checkpoints").exists() and not (run.out / "model.partial").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_adapters(run_script, checkpoints, data, script):
    args = {"rollouts_per_step" if "fkl" in script else "prompts_per_step": 4, "max_steps": 2, "max_response_tokens": 8}
    run = run_script(script, teacher=checkpoints.wide, student=checkpoints.student, train_data=data, lora_rank=2, **args)
    assert (run.out / "adapter" / "adapter_model.safetensors").exists() and all(map(lora.is_adapter, run.updates[0][1]))
    assert run.metrics[-1]["charts/learning_rate"] == run.record["args"]["learning_rate"] == 1e-5


def test_the_learning_rate_is_ten_times_that_of_full_fine_tuning_unless_given(checkpoints):
    for given, rank, expected in ((None, 0, 1e-6), (None, 8, 1e-5), (3e-4, 8, 3e-4)):
        args = grpo.Args(model=checkpoints.student, lora_rank=rank, learning_rate=given)
        common.check(args, "group_size")
        assert args.learning_rate == expected


@pytest.mark.parametrize("script", ["grpo", "opd"])
def test_a_killed_run_goes_on_to_the_same_bits_from_its_adapters(
    run_script, fake_grader, checkpoints, data, tmp_path, monkeypatch, script
):
    fake_grader(FakeGrader.rule)
    args = next(args for name, args in jobs(checkpoints, data, tmp_path / "whole") if name == script)
    args |= {"lora_rank": 4, "learning_rate": 0.01}
    whole = run_script(script, **args)
    args |= {"out": str(tmp_path / "killed"), "save_every": 2}
    with interrupted(monkeypatch, at=4):
        run_script(script, **args)
    [folder] = (tmp_path / "killed" / "checkpoints").iterdir()
    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = [name for name, what in held.items() if getattr(what, "size", None)]
    assert tensors and all(map(lora.is_adapter, tensors)), "adapters and their moments, no weights"
    for flag, text in (("lora_rank", "--lora-rank was 4, now 2"), ("lora_alpha", "--lora-alpha was 32")):
        with pytest.raises(UsageError, match=f"--resume: {text}"):
            run_script(script, **args | {"resume": True, flag: 2})
    resumed = run_script(script, **args, resume=True)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, got = load_file(whole.out / name), load_file(resumed.out / name)
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    for mine, theirs in zip(resumed.metrics, whole.metrics, strict=True):
        assert all(mine[key] == theirs[key] for key in theirs if not key.startswith(TIMES))


def test_the_hf_sampler_samples_what_adapters_compute():
    model, prompts = with_adapters(), [[22, 1, 10, 2, 16, 23], [22, 5, 23]]
    plain = random_model()
    plain.load_state_dict(dict(lora.plain_weights(model)), strict=False)
    options = {"max_response_tokens": 12, "temperature": 1.0}
    responses, expected = (
        HFSampler(one, toy.make_tokenizer(), torch.float32, **options).sample(prompts, 3, (1,)) for one in (model, plain)
    )
    base = HFSampler(random_model(), toy.make_tokenizer(), torch.float32, **options).sample(prompts, 3, (1,))
    assert [r.ids for r in responses] == [r.ids for r in expected] != [r.ids for r in base]
    assert all("forward" not in vars(layer) for _, layer in lora.adapted(model))


def test_flops_leave_out_what_a_frozen_weight_is_spared():
    full, adapted = random_model(), with_adapters(learned=False)
    P, A = (sum(p.numel() for p in adapted.parameters() if p.requires_grad is one) for one in (False, True))
    assert models.train_flops(full) == 6 * P and models.train_flops(adapted) == 4 * P + 6 * A


@pytest.mark.parametrize(
    "flag, value, says", [("--lora-rank", -1, "must be 0 .train all weights. or more"), ("--lora-alpha", 0, "above 0")]
)
def test_flags_that_cannot_work(cli, checkpoints, data, flag, value, says):
    code, _, err = cli("grpo", "--model", checkpoints.student, "--train-data", data, f"{flag}={value}")
    assert code == 2 and err.count("\n") == 1 and flag in err and re.search(says, err)


def test_peft_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="--lora-rank needs a package: pip install peft"):
        lora.inject(random_model(), 4, 8, seed=1)


# ---------------------------------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_activations_are_those_that_autograd_saves(tmp_path, checkpointing):
    model = random_model(num_hidden_layers=5)
    model.save_pretrained(tmp_path)
    lora.inject(model, 4, 8, seed=1)
    if checkpointing:
        models.enable_gradient_checkpointing(model)
    saved = saved_activations(model)
    args = grpo.Args(model=str(tmp_path), lora_rank=4, gradient_checkpointing=checkpointing)
    hw = plan.Hardware(gpus=1, bytes=1e9, shards=1, cuda=False)
    counted = plan.activation_bytes(args, plan.Sizes.read(tmp_path, "--model"), hw, rows=3, length=40)
    if checkpointing:  # autograd keeps the inputs; the plan adds the one layer that backward computes anew
        assert saved < counted < 3 * saved + 5 * 3 * 40 * 64 * 4 * 12
    else:
        assert counted == pytest.approx(saved, rel=0.1)


def test_adapters_are_counted_and_the_reference_costs_nothing(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    sizes = plan.Sizes.read(tmp_path, "--model")
    adapters = sum(p.numel() for p in with_adapters(rank=4).parameters() if p.requires_grad)
    assert 4 * sizes.rank_one == adapters
    args = grpo.Args(model=str(tmp_path), lora_rank=4, plan_gpu="80GB", sampler="hf", kl_coef=0.1)
    work, hw = plan.Workload(sizes, {"reference": sizes}, sizes, 64, 2), plan.Hardware.find(args)
    train, rollout = (plan.estimate(args, work, hw)[phase] for phase in ("train", "rollout"))
    assert (train["weights"], train["adapters"], train["AdamW"], train["gradients"]) == (
        2 * sizes.params, 4 * adapters, 8 * adapters, 4 * adapters
    )  # fmt: skip
    assert train["head's gradient"] == 0 and "reference" not in train and "bfloat16 copy of the weights" not in train
    assert rollout["merged copy of the weights"] == 2 * (sizes.params - sizes.root)
    spared = plan.flops(work, 10, 100)["train"] - plan.flops(work, 10, 100, lora_rank=4)["train"]
    assert spared == pytest.approx(10 * 100 * (2 * sizes.params - 6 * adapters))


@pytest.mark.slow
def test_the_stages_on_one_gpu_are_planned_as_documented(hub, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(hub)
    page = (ROOT / "docs" / "lora.md").read_text()
    row = r"^\| `(\w+)\.py (.*?)` \| (\d+ GB) \| (\S+) GB \| (\S+) GB \| (\S+) tokens, (\S+) answers \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) == 8
    for script, flags, gpu, *figures in rows:
        module, words = conftest.SCRIPTS[script], [*flags.split(), "--gradient-checkpointing", "--plan"]
        with pytest.raises(SystemExit):
            module.main(tyro.cli(module.Args, args=[*words, "--plan-gpu", gpu.replace(" ", "")]))
        said = capsys.readouterr().out
        found = [re.search(p, said)[1] for p in (r"rollout: (\S+)", r"train: (\S+)", r"cache of (\d+)", r"tokens: (\S+) a")]
        assert found == [figure.replace(",", "") for figure in figures] and said.endswith("GB: fits\n"), flags


@pytest.mark.slow
def test_planned_memory_is_that_of_the_toy(world, tmp_path):
    flags = ["--train-data", world / "train.jsonl", "--instruction=", "--max-response-tokens", 64, "--max-steps", 2]
    flags += ["--model", world / "teacher_base", "--prompts-per-step", 16, "--minibatch-prompts", 8, "--lora-rank", 8]
    planned, used = planned_and_used("grpo.py", *flags, "--micro-batch-tokens", 2048, "--out", tmp_path / "run")
    assert planned == pytest.approx(used, rel=0.15)


# ----------------------------------------------------------------------------------------------------- ranks, and the engine
@pytest.mark.slow
def test_two_ranks_give_the_single_process_adapters(run_script, fake_grader, checkpoints, data, tmp_path):
    """And in bfloat16, where frozen weights are sharded in it and adapters in float32, a run goes through."""
    fake_grader(FakeGrader.rule)

    def with_lora(out):
        return [[script, args | {"lora_rank": 4, "learning_rate": 0.01}] for script, args in jobs(checkpoints, data, out)]

    bfloat16 = with_lora(tmp_path / "bfloat16")[0]
    bfloat16[1]["dtype"] = "bfloat16"
    ranked = torchrun(2, "tests/parallel_ranks.py", json.dumps([*with_lora(tmp_path / "ranked"), bfloat16]))
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    for script, args in with_lora(tmp_path / "single"):
        single = run_script(script, **args)
        out = tmp_path / "ranked" / single.out.name
        assert difference(single.out, out) < 1e-5, script
        mine, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (single.out, out))
        assert mine.keys() == theirs.keys() and all((mine[k] - theirs[k]).norm() < 1e-4 * mine[k].norm() for k in mine)
        for ours, row in zip(single.metrics, read_jsonl(out / "metrics.jsonl"), strict=True):
            for key in ours:
                if not key.startswith(TIMES):
                    assert row[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-5), (script, key)
    out = tmp_path / "bfloat16" / "grpo"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(out / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm: make env-vllm")
def test_vllm_samples_from_the_adapters_behind_every_sync(tmp_path):
    """Three syncs, tied and untied; a sync that forgets the adapters ends the run."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "tests" / "vllm_engine.py", tmp_path / "lora.json", "--lora"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "lora.json").read_text())
    assert measured.keys() == {"tied", "untied"}
    for one in measured.values():
        assert len(one["greedy"]) == 3 and one["greedy"] == one["greedy_hf"]
        assert len({json.dumps(ids) for ids in one["greedy"]}) == 3, "each sync brought other weights"
        assert all(0 < diff < 1e-5 for diff in one["canary"])
        assert "weight sync 4" in one["forgotten"] and "--canary-tolerance" in one["forgotten"]
