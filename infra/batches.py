# docs/architecture.md
"""From prompts and responses of many lengths to micro-batches, and through a model to the hidden states of the responses."""

import torch

from infra.models import compute_device


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in groups of similar length with rows x longest <= token_budget (a longer sequence is its own group).
    Sorting by length keeps padding small; the loss uses one global denominator, so the split changes no gradient."""
    groups, order = [], sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def response_hidden(model, prompts: list[list[int]], responses: list[list[int]]):
    """Final hidden states that predict the response tokens, packed row after row without padding.

    Returns (hidden (N, H), head (V, H), ids (N,)) with N the sum of response lengths, 0 for no rows; the head is whole
    until the backward that follows, on a sharded model too. Right padding needs no attention mask in a causal model: no
    real token can see it."""
    if not prompts:  # a rank without rows of its own still enters the collectives of the others
        hidden, head, _ = response_hidden(model, [[0]], [[0]])
        return hidden[:0], head, torch.zeros(0, dtype=torch.long, device=hidden.device)
    B, T = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids, predicts = torch.zeros((B, T), dtype=torch.long), torch.zeros((B, T), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        predicts[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True  # position t predicts token t + 1
    device = compute_device(model)
    forward = getattr(model, "hooked_base_model", model.base_model)  # the former gathers a sharded model's weights
    hidden = forward(input_ids=input_ids.to(device), use_cache=False).last_hidden_state  # (B, T, H)
    ids = torch.cat([torch.tensor(response, dtype=torch.long) for response in responses]).to(device)
    return hidden[predicts.to(device)], model.get_output_embeddings().weight, ids  # (N, H), (V, H), (N,)
