# docs/samplers.md
"""The hf sampler: a live transformers model with a KV cache, behind the contract of sampler.py."""

import contextlib

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from infra import lora, parallel
from infra.models import autocast, compute_device
from infra.sampler import Response, Sampler, eos_token_ids, make_response, random_numbers, vocabulary_size
from kernels.linear import project


class GrowingLayer(DynamicLayer):
    """A cache layer with a buffer for `capacity` tokens a row, where DynamicLayer copies the whole cache per token. Rows may
    be repeated behind the prompts, and chosen at any time."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.buffers = capacity, [None, None]

    def update(self, key_states, value_states, *args, **kwargs):
        key_states = key_states.to(value_states.dtype)  # norms and rotary embeddings give float32 keys under autocast
        if not self.is_initialized:  # the prompts
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys = self._append(0, self.keys, key_states)
            self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.buffers = [None, None]  # freed a layer at a time, so that there are never two caches

    def _append(self, which: int, cached, new):  # (rows, heads, length, D), (rows, heads, q, D)
        length, total = cached.shape[-2], cached.shape[-2] + new.shape[-2]
        if self.buffers[which] is None:
            self.buffers[which] = new.new_empty(*new.shape[:-2], self.capacity, new.shape[-1])
            self.buffers[which][..., :length, :] = cached
        self.buffers[which][..., length:total, :] = new
        return self.buffers[which][..., :total, :]


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' sdpa attention without its copies: for each new token it repeats all cached keys and values, once for
    every query head that shares them. Those queries attend here as if they were several tokens of one head."""
    rows, heads, q, D = query.shape
    if q > 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.reshape(rows, key.shape[1], -1, D)  # (rows, KV, heads / KV, D)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, q, heads, D), None


def grouped_mask(*args, **kwargs):
    """transformers' sdpa mask, (rows, 1, q, keys) bool, in which the padding's own positions would see no key: here they see
    all. Attention over nothing has no value, and kernels for GPUs have given nan for it."""
    mask = sdpa_mask(*args, **kwargs)
    return mask if mask is None else mask | ~mask.any(-1, keepdim=True)


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", grouped_mask)


@contextlib.contextmanager
def grouped(model):
    """Within, a model that attends by sdpa does so by grouped_attention."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation("grouped")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class HFSampler(Sampler):
    """Samples from a live transformers model with a KV cache.

    Prompts are sorted by length and batched under `batch_tokens` of cache (prompt + response tokens, summed over rows);
    a prompt is prefilled once for its n responses, and finished rows leave the batch."""

    def __init__(
        self,
        model,
        tokenizer,
        dtype,
        *,
        max_response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        batch_tokens=131072,
    ):
        self.model, self.dtype, self.device = model, dtype, compute_device(model)
        self.pad_id, self.max_response_tokens, self.batch_tokens = tokenizer.pad_token_id, max_response_tokens, batch_tokens
        self.tokenizer_size = vocabulary_size(tokenizer)
        self.canary_logprob_diff = 0.0  # the weights are the trainer's
        self.head = None  # of _float32_logits
        self.eos_ids = torch.tensor(eos_token_ids(model.generation_config.eos_token_id, tokenizer), device=self.device)
        self.greedy = temperature == 0
        self.warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def sleep(self) -> None:
        """Free memory for training. The cache is gone already."""

    def update_weights(self, model) -> None:
        """Take the weights of `model`. Here the sampler reads the live model, so there is nothing to copy."""
        self.model = model

    def _sample(self, prompts: list[list[int]], n: int, seeds: list[tuple], progress, finished) -> None:
        was_training = self.model.training
        self.model.eval()  # gradient checkpointing in train mode would switch the cache off
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with (
            parallel.gathered(self.model),
            grouped(self.model),
            torch.inference_mode(),
            lora.merged(self.model, self.dtype),
            autocast(self.device, self.dtype),
            self._float32_logits(),
        ):
            while order:
                rows = [order.pop()]  # longest first: the first batch is the largest, so running out of memory is early
                row_tokens = n * (len(prompts[rows[0]]) + self.max_response_tokens)
                while order and (len(rows) + 1) * row_tokens <= self.batch_tokens:
                    rows.append(order.pop())
                batch = self._sample_batch(
                    [prompts[i] for i in rows], [(*seeds[i], j) for i in rows for j in range(n)], progress
                )
                finished(rows, batch)  # a batch is kept whole or not at all: without it the later ones are the same
        self.model.train(was_training)

    @contextlib.contextmanager
    def _float32_logits(self):
        """Within, `head` is the matrix (V, H) for float32 logits, as the losses compute them. The model's own are
        rounded to bfloat16, by up to 1/16 from 16 to 32: another policy than is trained. None in the other dtypes."""
        if self.dtype == torch.bfloat16:
            head = self.model.get_output_embeddings().weight
            # as in kernels/linear.py: a CPU has no bfloat16 product with a float32 result
            self.head = head.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            yield
        finally:
            self.head = None

    def _sample_batch(self, prompts, seeds, progress) -> list[Response]:
        """One response per seed: as many for each prompt, in a row."""
        B, P, T = len(prompts), max(map(len, prompts)), self.max_response_tokens
        n = len(seeds) // B
        input_ids = torch.full((B, P), self.pad_id)
        mask = torch.zeros((B, P), dtype=torch.long)  # left padding: the next token of every row is in one column
        for row, prompt in enumerate(prompts):
            input_ids[row, P - len(prompt) :] = torch.tensor(prompt)
            mask[row, P - len(prompt) :] = 1
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        padded = not bool(mask.all())
        position = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, P)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [GrowingLayer(P + T) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        logits = self._forward(input_ids, mask if padded else None, position, cache).repeat_interleave(n, 0)  # (B*n, V)
        cache.batch_repeat_interleave(n)
        mask, position = mask.repeat_interleave(n, 0), position[:, -1:].repeat_interleave(n, 0)

        ids = torch.full((B * n, T), self.pad_id, device=self.device)
        logprobs = torch.zeros((B * n, T), device=self.device)
        noise = torch.from_numpy(np.stack([random_numbers(s, 0 if self.greedy else T) for s in seeds])).to(self.device)
        live = torch.arange(B * n, device=self.device)  # output row of each row still in the batch
        running = torch.ones(B * n, dtype=torch.bool, device=self.device)  # of the rows still in the batch
        left = B * n
        for t in range(T):
            scores = logits.float() if logits.dtype != torch.float64 else logits
            log_p = torch.log_softmax(self.warpers(None, scores), dim=-1)  # (rows, V)
            if self.greedy:
                token = log_p.argmax(-1)
            else:  # the first id whose cumulative probability exceeds the row's random number; float64, as V is large
                cumulative = log_p.double().exp().cumsum(-1)  # (rows, V)
                threshold = noise[live, t, None] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=log_p.shape[-1] - 1)
            ids[live, t] = token  # rows that have ended are still written to, behind their EOS
            logprobs[live, t] = log_p.gather(-1, token[:, None])[:, 0].float()
            running = running & ~torch.isin(token, self.eos_ids)
            before, left = left, int(running.sum())
            if progress is not None:
                progress.update(before - left)
            if left == 0 or t == T - 1:
                break
            if left <= 0.75 * len(live):  # dropping rows copies the cache, so not for each one
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, running, token, mask, position = live[keep], running[keep], token[keep], mask[keep], position[keep]
            position = position + 1
            if padded:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(token[:, None], mask if padded else None, position, cache)
        if progress is not None:
            progress.update(left)
        eos = torch.isin(ids[:, : t + 1], self.eos_ids)
        truncated = ~eos.any(-1)
        lengths = torch.where(truncated, t + 1, eos.int().argmax(-1) + 1)  # the first EOS ends a response
        columns = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), truncated.tolist(), strict=True)
        return [make_response(row[:length], logp[:length], cut, self.tokenizer_size) for row, logp, length, cut in columns]

    def _forward(self, input_ids, mask, position, cache):
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        if self.head is None:
            return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]  # (rows, V)
        forward = getattr(self.model, "hooked_base_model", self.model.base_model)
        hidden = forward(**inputs, use_cache=True).last_hidden_state[:, -1]
        with torch.autocast(self.device.type, enabled=False):
            logits = hidden.new_empty(len(hidden), len(self.head), dtype=torch.float32)
            return project(hidden.to(self.head.dtype), self.head, logits)
