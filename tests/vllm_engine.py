"""What a real vLLM engine does, as JSON for test_sampler_vllm.py: `python tests/vllm_engine.py OUT.json`, or under
torchrun with `--tp N`; for test_lora.py with `--lora`. A process of its own, because vLLM changes torch's threads, groups
and environment."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.distributed as dist
from conftest import random_model

import toy
from infra import lora, parallel, sampler_vllm
from infra.sampler_hf import HFSampler
from infra.sampler_vllm import CanaryError, VLLMSampler

sampler_vllm.CPU_CACHE_BYTES = 64 << 20
MODELS = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)]
PROMPTS = [[22, 1, 10, 2, 16, 23], [22, 7, 16, 23], [22, 3, 12, 4, 11, 5, 10, 9, 12, 2, 16, 23], [22, 9, 12, 9, 16, 23]]
T = 24
engines = []  # kept: collecting one would destroy the process groups of all


def checkpoint(**config):
    """A random model and the folder it is saved in; heads of 32, as vLLM's CPU attention has none of 16."""
    model, folder = random_model(**({"head_dim": 32} | config)), tempfile.mkdtemp()
    model.save_pretrained(folder, is_main_process=True)
    toy.make_tokenizer().save_pretrained(folder)
    return model, folder


def make(model, folder, dtype=torch.float32, **options):
    options = {"longest_prompt": 16, "max_response_tokens": T} | options
    engines.append(VLLMSampler(folder, toy.make_tokenizer(), dtype, model, **options))
    return engines[-1]


def hf(model, **options):
    return HFSampler(model, toy.make_tokenizer(), torch.float32, max_response_tokens=T, **options)


@torch.no_grad()
def perturb(model, seed=0):
    for k, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + k))
        parameter.add_(0.02 * noise)


@torch.no_grad()
def logprob_diff(model, responses, n, warpers=None):
    """Largest difference from transformers' own log-probabilities, one row at a time without a cache."""
    worst = 0.0
    for k, response in enumerate(responses):
        ids = torch.tensor([PROMPTS[k // n] + response.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(PROMPTS[k // n]) - 1 : -1]  # (R, V)
        logits = warpers(None, logits) if warpers else logits
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(response.ids)[:, None])[:, 0]
        worst = max(worst, float((logprobs - torch.tensor(response.sampler_logprobs)).abs().max()))
    return worst


def refusal(action, *args) -> str | None:
    try:
        action(*args)
    except CanaryError as error:
        return str(error)


def sync_and_sample(sampler, model):
    sampler.update_weights(model)
    sampler.sample(PROMPTS, 1)


def greedy(sampler, prompts=PROMPTS):
    params, sampler.params = sampler.params, sampler.params.clone()
    sampler.params.temperature = 0
    responses = sampler.sample(prompts, 1)
    sampler.params = params
    return responses


def check_model(arch, tied) -> dict:
    model, folder = checkpoint(arch=arch, tied=tied)
    sampler = make(model, folder)
    measured = {"greedy_before": [r.ids for r in greedy(sampler)], "canary_start": sampler.canary_logprob_diff}
    perturb(model, 1)
    rpc, sampler.llm.collective_rpc = sampler.llm.collective_rpc, lambda *a, **kw: None
    measured["skipped_sync"] = refusal(sync_and_sample, sampler, model)
    sampler.llm.collective_rpc = rpc
    sampler.update_weights(model)
    measured["greedy"] = [r.ids for r in greedy(sampler)]
    measured["canary_synced"] = sampler.canary_logprob_diff
    measured["greedy_hf"] = [r.ids for r in hf(model, temperature=0).sample(PROMPTS, 1)]
    measured["diff"] = logprob_diff(model, sampler.sample(PROMPTS, 8), 8)
    measured["diff_greedy"] = logprob_diff(model, greedy(sampler), 1)

    perturb(model, 2)
    reset, sampler.llm.reset_prefix_cache = sampler.llm.reset_prefix_cache, lambda: False
    measured["reset_refused"] = refusal(sync_and_sample, sampler, model)
    sampler.llm.reset_prefix_cache = lambda: True
    measured["stale_prefix_cache"] = refusal(sync_and_sample, sampler, model)
    sampler.llm.reset_prefix_cache = reset
    if tied:
        perturb(model, 3)
        repack, sampler_vllm.repack_head = sampler_vllm.repack_head, lambda model: None
        measured["stale_head"] = refusal(sync_and_sample, sampler, model)
        sampler_vllm.repack_head = repack
    sampler.canary_tolerance = 0.0
    perturb(model, 4)
    sampler.llm.collective_rpc = lambda *a, **kw: None
    measured["tolerance_0"] = refusal(sync_and_sample, sampler, model)
    sampler.llm.collective_rpc = rpc
    return measured


def check_sampling() -> dict:
    """Everything that does not depend on the architecture."""
    model, folder = checkpoint()
    sampler = make(model, folder, sleep=True)
    responses = sampler.sample(PROMPTS, 16, (3, 1))
    measured = {"responses": [[len(r.ids), len(r.sampler_logprobs), r.truncated, r.ids[-1]] for r in responses]}
    measured["eos_inside"] = sum(toy.ID["<|im_end|>"] in r.ids[:-1] for r in responses)
    measured["repeats"] = [r.ids for r in sampler.sample(PROMPTS, 16, (3, 1))] == [r.ids for r in responses]
    measured["other_seed_differs"] = [r.ids for r in sampler.sample(PROMPTS, 16, (3, 2))] != [r.ids for r in responses]
    same = sampler.sample([PROMPTS[0]] * 8, 1)
    measured["distinct_of_equal_prompts"] = len({tuple(r.ids) for r in same})

    measured["many"] = len(sampler.sample(PROMPTS * 200, 1))  # more tokens than vLLM reads at once
    counts = []
    bar = type("Bar", (), {"update": lambda self, count: counts.append(count)})()
    sampler.sample(PROMPTS, 5, progress=bar)
    measured["progress"] = sum(counts)

    first_ids = torch.tensor([r.ids[0] for r in sampler.sample(PROMPTS[:1], 4000)])
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1], -1)  # (V,)
    measured["frequency_diff"] = float((torch.bincount(first_ids, minlength=len(p)) / 4000 - p).abs().max())

    sampler.sleep()
    perturb(model, 1)
    sync_and_sample(sampler, model)
    measured["canary_behind_sleep"] = sampler.canary_logprob_diff

    for name, options in {
        "temperature": {"temperature": 0.7},
        "filters": {"temperature": 0.7, "top_p": 0.7, "top_k": 4},
    }.items():
        filtered = make(model, folder, **options)
        measured[f"diff_{name}"] = logprob_diff(model, filtered.sample(PROMPTS, 8), 8, hf(model, **options).warpers)

    with torch.no_grad():
        model.get_input_embeddings().weight[3] *= 1.5
    model.generation_config.eos_token_id = [toy.ID["<|im_end|>"], 3]
    model.save_pretrained(folder)
    reads = make(None, folder)  # the checkpoint itself, with its two EOS ids
    measured["read_greedy"] = [r.ids for r in greedy(reads)]
    measured["read_greedy_hf"] = [r.ids for r in hf(model, temperature=0).sample(PROMPTS, 1)]
    measured["ends"] = sorted({r.ids[-1] for r in reads.sample(PROMPTS, 16) if not r.truncated})

    bf16 = make(model, folder, torch.bfloat16)
    bf16.sample(PROMPTS, 1)
    measured["bfloat16_canary"] = bf16.canary_logprob_diff

    padded, folder = checkpoint(vocab_size=64, seed=5)
    size = len(toy.make_tokenizer())
    sampler = make(padded, folder)
    cut = sampler.sample(PROMPTS, 16)
    measured["padded"] = {
        "cut": sum(r.out_of_vocab for r in cut),
        "all_truncated": all(r.truncated for r in cut if r.out_of_vocab),
        "largest_id": max(i for r in cut for i in r.ids),
        "size": size,
        "aligned": all(len(r.ids) == len(r.sampler_logprobs) for r in cut),
    }

    sharded, folder = checkpoint(seed=6)
    sampler = make(sharded, folder)
    perturb(sharded, 1)
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    parallel.shard(sharded, torch.float32, hybrid=False, offload=False)  # vLLM has made a process group of one
    measured["sharded_type"] = type(next(sharded.parameters())).__name__
    sync_and_sample(sampler, sharded)
    measured["sharded_canary"] = sampler.canary_logprob_diff
    return measured


def check_ranks(tp: int) -> dict:
    """Two ranks that divide the prompts, or answer them together, weights sharded by FSDP2."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = random_model(head_dim=32)
    received = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(received)
    [folder] = received
    model.save_pretrained(folder, is_main_process=rank == 0)
    toy.make_tokenizer().save_pretrained(folder)
    dist.barrier()
    perturb(model, 1)
    expected = [r.ids for r in hf(model, temperature=0).sample(PROMPTS, 1)]
    parallel.shard(model, torch.float32, hybrid=False, offload=False)
    sampler = make(model, folder, tp=tp)
    measured = {"equal": [r.ids for r in greedy(sampler)] == expected, "canary": sampler.canary_logprob_diff}
    sync_and_sample(sampler, model)
    measured["canary_again"] = sampler.canary_logprob_diff
    every = [None, None]
    dist.all_gather_object(every, measured)
    return dict(enumerate(every))


def check_lora(tied: bool) -> dict:
    """Three syncs of adapters that learn, and one that brings the base alone."""
    model, folder = checkpoint(tied=tied)
    lora.inject(model, 4, 8, seed=1)
    adapters, measured = [layer.lora_B.default.weight for _, layer in lora.adapted(model)], {}
    sampler = make(model, folder)
    for sync in range(1, 4):
        with torch.no_grad():
            for k, b in enumerate(adapters):
                b.add_(0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(100 * sync + k)))
        sampler.update_weights(model)
        measured.setdefault("greedy", []).append([r.ids for r in greedy(sampler)])
        measured.setdefault("greedy_hf", []).append([r.ids for r in hf(model, temperature=0).sample(PROMPTS, 1)])
        measured.setdefault("canary", []).append(sampler.canary_logprob_diff)
    merge, lora.merge = lora.merge, lambda layer: layer.base_layer.weight
    measured["forgotten"] = refusal(sync_and_sample, sampler, model)
    lora.merge = merge
    return measured


if __name__ == "__main__":
    if "--lora" in sys.argv:
        result = {"tied" if tied else "untied": check_lora(tied) for tied in (True, False)}
    elif "--tp" in sys.argv:
        result = check_ranks(int(sys.argv[sys.argv.index("--tp") + 1]))
    else:
        result = {f"{arch} {'tied' if tied else 'untied'}": check_model(arch, tied) for arch, tied in MODELS}
        result["sampling"] = check_sampling()
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(result))
