"""The hf sampler against transformers itself: the same ids, and log-probabilities recomputed without cache or padding."""

import pytest
import torch
from conftest import next_token_logits, random_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import toy
from infra import batches, models, sampler_hf
from infra.sampler_hf import GrowingLayer, HFSampler

EOS = toy.ID["<|im_end|>"]
PROMPTS = [[22, 1, 10, 2, 16, 23], [22, 7, 16, 23], [22, 3, 12, 4, 11, 5, 10, 9, 12, 2, 16, 23], [22, 0, 16, 23],
           [22, 9, 12, 9, 16, 23], [22, 5, 11, 1, 10, 8, 16, 23]]  # fmt: skip
MODELS = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)]


def make(arch="qwen3", tied=True, dtype=torch.float32, T=24, **options):
    model = random_model(arch, tied).to(dtype)
    return model, HFSampler(model, toy.make_tokenizer(), dtype, max_response_tokens=T, **options)


def recomputed(model, prompt, response, temperature=1.0):  # -> (R,)
    with torch.no_grad():
        log_p = torch.log_softmax(next_token_logits(model, prompt, response.ids).double() / temperature, -1)
    return log_p.gather(1, torch.tensor(response.ids)[:, None])[:, 0]


def assert_logprobs(model, prompts, responses, n, temperature=1.0, tolerance=3e-5):
    assert len(responses) == len(prompts) * n
    for k, response in enumerate(responses):
        expected = recomputed(model, prompts[k // n], response, temperature)
        assert (torch.tensor(response.sampler_logprobs) - expected).abs().max() < tolerance


@pytest.mark.parametrize("arch, tied", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_equal_the_recomputed_ones(monkeypatch, arch, tied, temperature):
    """Prompts of different lengths in one batch, rows that end at different times, and rows that leave the batch."""
    shrunk, select = [], DynamicCache.batch_select_indices

    def recording_select(self, indices):
        shrunk.append(len(indices))
        return select(self, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", recording_select)
    model, sampler = make(arch, tied, temperature=temperature)
    responses = sampler.sample(PROMPTS, 8)
    assert len({len(r.ids) for r in responses}) > 3 and shrunk, "rows should end and leave at different times"
    assert_logprobs(model, PROMPTS, responses, 8, temperature)


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_queries_that_share_a_key_value_head_attend_without_copies_of_it(monkeypatch, arch):
    """Two queries for each of two heads, so that a wrong order of the four is seen; padded prompts and equal ones."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = random_model(arch, **heads).double()
    sampler = HFSampler(model, toy.make_tokenizer(), torch.float64, max_response_tokens=24)
    attend, seen = sampler_hf.scaled_dot_product_attention, []

    def recording(query, key, value, **kwargs):
        seen.append((query.shape[1:3], key.shape[1]))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(sampler_hf, "scaled_dot_product_attention", recording)
    for prompts in (PROMPTS, PROMPTS[1:2]):
        assert_logprobs(model, prompts, sampler.sample(prompts, 4), 4, tolerance=1e-6)
    assert set(seen) == {((2, 2), 2)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_equal_the_trainers(temperature):
    model, sampler = make(temperature=temperature)
    responses = sampler.sample(PROMPTS, 2)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    with torch.no_grad():
        hidden, _, ids = batches.response_hidden(model, prompts, [r.ids for r in responses])
    logits = hidden @ model.get_output_embeddings().weight.T / temperature
    logprobs = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]
    assert ids.tolist() == [i for r in responses for i in r.ids]
    reported = torch.tensor([lp for r in responses for lp in r.sampler_logprobs])
    assert (logprobs - reported).abs().max() < 1e-5


@pytest.mark.parametrize("arch, tied", MODELS)
def test_greedy_equals_transformers_generate(arch, tied):
    model, sampler = make(arch, tied, temperature=0)
    for prompt, response in zip(PROMPTS, sampler.sample(PROMPTS, 1), strict=True):
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :].tolist()
        assert response.ids == ids


def test_samples_follow_the_models_distribution():
    model, sampler = make(T=1)
    first = torch.tensor([r.ids[0] for r in sampler.sample(PROMPTS[:1], 20000)])
    with torch.no_grad():
        p = torch.softmax(next_token_logits(model, PROMPTS[0], [0])[0], -1)  # (V,)
    frequency = torch.bincount(first, minlength=len(p)) / len(first)
    assert p.max() < 0.9 and (frequency - p).abs().max() < 4 * (0.25 / len(first)) ** 0.5


def test_eos_is_the_last_id_and_only_there_and_truncated_says_so():
    _, sampler = make(T=12)
    responses = sampler.sample(PROMPTS, 16)
    for r in responses:
        assert len(r.ids) == len(r.sampler_logprobs) and 1 <= len(r.ids) <= 12 and EOS not in r.ids[:-1]
        assert r.truncated == (r.ids[-1] != EOS) and (not r.truncated or len(r.ids) == 12)
    assert {r.truncated for r in responses} == {True, False}
    assert any(len(r.ids) == 12 and not r.truncated for r in sampler.sample(PROMPTS, 400)), "an EOS in the last place"


def test_every_eos_of_the_generation_config_ends_a_response():
    model, _ = make()
    model.generation_config.eos_token_id = [EOS, 3]
    sampler = HFSampler(model, toy.make_tokenizer(), torch.float32, max_response_tokens=24)
    ends = [r.ids[-1] for r in sampler.sample(PROMPTS, 16) if not r.truncated]
    assert set(ends) == {EOS, 3}


@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
def test_batching_keeps_order_and_changes_no_greedy_response(monkeypatch, batch_tokens):
    model, sampler = make(dtype=torch.float64, temperature=0, batch_tokens=batch_tokens)
    sizes, sample_batch = [], sampler._sample_batch
    monkeypatch.setattr(
        sampler, "_sample_batch", lambda prompts, n, bar: sizes.append(len(prompts)) or sample_batch(prompts, n, bar)
    )
    together = sampler.sample(PROMPTS, 2)
    assert (len(sizes) == 6) == (batch_tokens == 1) and (len(sizes) == 1) == (batch_tokens == 10**6)
    for k, response in enumerate(together):
        assert response.ids == sampler.sample([PROMPTS[k // 2]], 1)[0].ids
    assert_logprobs(model, PROMPTS, together, 2, tolerance=1e-6)


def test_a_finished_row_leaves_without_changing_the_others():
    """Greedy, so that each row's answer alone is known; the batch holds rows that end early and rows that never do."""
    for seed in range(20):
        model = random_model(seed=seed).double()
        sampler = HFSampler(model, toy.make_tokenizer(), torch.float64, max_response_tokens=40, temperature=0)
        together = sampler.sample(PROMPTS, 1)
        if len({len(r.ids) for r in together}) > 2 and any(r.truncated for r in together):
            break
    else:
        pytest.fail("no model whose greedy answers end at different times")
    for prompt, response in zip(PROMPTS, together, strict=True):
        [alone] = sampler.sample([prompt], 1)
        assert (alone.ids, alone.truncated) == (response.ids, response.truncated)
        assert alone.sampler_logprobs == pytest.approx(response.sampler_logprobs, abs=1e-6)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.7, "temperature": 0.7}])
def test_top_k_and_top_p_restrict_the_support(options):
    """The filters' definitions, written out; the reported log-probability is that of the renormalised distribution."""
    model, sampler = make(**options)
    cut = 0
    for prompt, response in zip([p for p in PROMPTS for _ in range(8)], sampler.sample(PROMPTS, 8), strict=True):
        with torch.no_grad():
            logits = next_token_logits(model, prompt, response.ids).double() / options.get("temperature", 1.0)  # (R, V)
        for z, token, logprob in zip(logits, response.ids, response.sampler_logprobs, strict=True):
            order = z.argsort(descending=True)[: options.get("top_k") or len(z)]
            p = torch.softmax(z[order], -1)
            before = p.cumsum(-1) - p  # mass of the likelier tokens: the nucleus ends where it reaches top_p
            kept = order[before < options.get("top_p", 1.0)].tolist()
            assert token in kept
            expected = z[token] - z[kept].logsumexp(-1)
            assert logprob == pytest.approx(float(expected), abs=1e-5)
            cut += len(z) - len(kept)
    assert cut > 0


@pytest.mark.parametrize("n", [1, 3])
def test_growing_layer_equals_dynamic_layer(n):
    """Prefill, repeat for n responses, append one by one until the buffer is full, drop rows in between."""
    torch.manual_seed(0)
    layers, rows = [GrowingLayer(5 + 99), DynamicLayer()], 4
    for step in range(100):
        new = torch.randn(2, rows, 2, 5 if step == 0 else 1, 8)
        for one in zip(*[layer.update(*new) for layer in layers], strict=True):
            assert torch.equal(*one)
        if step == 0:
            for layer in layers:
                layer.batch_repeat_interleave(n)
            rows *= n
        if step in (20, 21, 90):
            keep = torch.arange(rows)[torch.arange(rows) != step % rows]
            for layer in layers:
                layer.batch_select_indices(keep)
            rows -= 1
        assert layers[0].get_seq_length() == layers[1].get_seq_length() == 5 + step


def test_growing_layer_notices_rows_chosen_back_to_their_first_number():
    """Two prompts, two responses each, and the first prompt's both end at once: two rows again, but not the same two."""
    torch.manual_seed(0)
    layers = [GrowingLayer(7), DynamicLayer()]
    for length in (5, 1, 1):
        new = torch.randn(2, 2, 2, length, 8)
        for one in zip(*[layer.update(*new) for layer in layers], strict=True):
            assert torch.equal(*one)
        if length == 5:
            for layer in layers:
                layer.batch_repeat_interleave(2)
                layer.batch_select_indices(torch.tensor([2, 3]))


def test_growing_layer_is_what_the_sampler_uses(monkeypatch):
    used, update = [], GrowingLayer.update
    monkeypatch.setattr(GrowingLayer, "update", lambda self, *a, **kw: used.append(1) or update(self, *a, **kw))
    _, sampler = make(T=2)
    sampler.sample(PROMPTS[:1], 1)
    assert used


def test_the_seed_decides_the_samples():
    _, sampler = make()
    runs = [[r.ids for r in sampler.sample(PROMPTS, 2, seed)] for seed in ((1,), (1,), (2,), (1, 1))]
    assert runs[0] == runs[1] and len({str(run) for run in runs}) == 3


def test_a_response_does_not_depend_on_the_batch_it_was_sampled_in():
    """Which is what lets ranks divide the prompts: the random numbers belong to the response, not to the batch."""
    runs = [[r.ids for r in make(dtype=torch.float64, batch_tokens=size)[1].sample(PROMPTS, 4)] for size in (1, 300, 10**6)]
    assert runs[0] == runs[1] == runs[2] and len({str(ids) for ids in runs[0]}) > 20


def test_what_was_kept_is_not_sampled_again_and_the_rest_comes_out_the_same():
    """Batch by batch: whatever was kept when a process was killed, the same responses in float32, bit for bit."""
    _, sampler = make(batch_tokens=300)
    kept = []
    whole = sampler.sample(PROMPTS, 4, (7,), keep=kept.append)
    assert len(kept) > 2 and sorted(i for some in kept for i in some) == list(range(len(PROMPTS)))
    assert all(some[i] == whole[4 * i : 4 * i + 4] for some in kept for i in some)
    for count in range(len(kept) + 1):
        again, known = [], {i: responses for some in kept[:count] for i, responses in some.items()}
        assert sampler.sample(PROMPTS, 4, (7,), known=known, keep=again.append) == whole
        assert again == kept[count:]


def test_sampling_leaves_the_model_as_it_was(monkeypatch):
    model, sampler = make(T=2)
    for training in (True, False):
        model.train(training)
        responses = sampler.sample(PROMPTS, 1)
        assert model.training == training and all(p.grad is None for p in model.parameters()) and len(responses) == 6
    monkeypatch.setattr(sampler, "_sample_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.sample(PROMPTS, 1)
    assert model.config._attn_implementation == "sdpa"


def test_update_weights_takes_the_new_model():
    _, sampler = make(temperature=0)
    other = random_model(seed=7)
    sampler.update_weights(other)
    assert_logprobs(other, PROMPTS, sampler.sample(PROMPTS, 1), 1)


def test_progress_counts_every_response_once():
    class Bar:
        total = 0

        def update(self, count):
            self.total += count

    bar, (_, sampler) = Bar(), make(T=12, batch_tokens=100)
    sampler.sample(PROMPTS, 5, progress=bar)
    assert bar.total == 30


def test_bfloat16_compute_over_float32_weights():
    model = random_model()
    sampler = HFSampler(model, toy.make_tokenizer(), torch.bfloat16, max_response_tokens=12)
    assert_logprobs(model, PROMPTS, sampler.sample(PROMPTS, 2), 2, tolerance=0.3)


def test_bfloat16_logits_are_not_rounded_to_it():
    """The trainer's losses compute them in float32; of logits around 100, bfloat16 keeps every half."""
    model = random_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    sampler = HFSampler(model, toy.make_tokenizer(), torch.bfloat16, max_response_tokens=1, temperature=20)
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 6]
    responses = sampler.sample(prompts, 4)
    with torch.no_grad(), models.autocast(sampler.device, torch.bfloat16):
        hidden = model.base_model(input_ids=torch.tensor(prompts)).last_hidden_state[:, -1]
    logits = hidden.double() @ model.lm_head.weight.double().T  # (prompts, V)
    assert logits.abs().max() > 100
    log_p = torch.log_softmax(logits / 20, -1)
    for k, response in enumerate(responses):
        assert abs(response.sampler_logprobs[0] - log_p[k // 4, response.ids[0]]) < 1e-4


def test_a_response_is_cut_before_an_id_beyond_the_tokenizer_and_counted():
    model, tokenizer = random_model(vocab_size=64, seed=5), toy.make_tokenizer()
    sampler = HFSampler(model, tokenizer, torch.float32, max_response_tokens=24)
    responses = sampler.sample(PROMPTS, 64)
    cut = [r for r in responses if r.out_of_vocab]
    assert 0 < len(cut) < len(responses) and any(not r.ids for r in cut)
    assert all(r.truncated for r in cut) and all(max(r.ids, default=0) < len(tokenizer) for r in responses)
    assert all(len(r.ids) == len(r.sampler_logprobs) for r in responses)
    assert not any(r.out_of_vocab for r in make()[1].sample(PROMPTS, 16))
