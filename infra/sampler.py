# docs/samplers.md
"""Samplers: prompts in, responses out, both as token ids; text is never tokenized again. The contract:

sample(prompts, n, seed)  n responses per prompt, with the log-probability of each sampled id and whether it was cut
update_weights(model)     sample from these weights from now on
sleep()                   the sampler's memory is free for training until update_weights

A sampler keeps no random state: the same weights, prompts and seed give the same responses, on any number of ranks, in
a resumed run as in an uninterrupted one. The hf sampler is in sampler_hf.py, the vllm sampler in sampler_vllm.py,
which alone imports vllm.
"""

from typing import NamedTuple

import numpy as np

from infra import parallel


def eos_token_ids(configured: int | list[int] | None, tokenizer) -> list[int]:
    """Every id that ends a response: the tokenizer's eos and those of the generation config."""
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *[i for i in configured if i is not None]})


def vocabulary_size(tokenizer) -> int:
    """The largest id + 1. len(tokenizer) counts the ids, which is less where they leave holes."""
    return max(tokenizer.get_vocab().values()) + 1


class Response(NamedTuple):
    ids: list[int]  # sampled token ids, the final EOS included; none after it
    sampler_logprobs: list[float]  # log p of each id under the sampling distribution
    truncated: bool  # hit max_response_tokens without an EOS, or was cut
    out_of_vocab: bool = False  # cut before an id that no token has


def make_response(ids: list[int], logprobs: list[float], truncated: bool, tokenizer_size: int) -> Response:
    """A response, cut before the first id beyond the tokenizer: heads are padded to a round number of rows, and nothing
    keeps the padding's probability at 0. Such an id has no text, and a teacher with another padding has no row for it."""
    if max(ids) < tokenizer_size:
        return Response(ids, logprobs, truncated)
    cut = next(t for t, token in enumerate(ids) if token >= tokenizer_size)
    return Response(ids[:cut], logprobs[:cut], truncated=True, out_of_vocab=True)


def random_numbers(seed: tuple[int, ...], count: int):
    """`count` uniform numbers in [0, 1), float64, of the stream that `seed` names."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(count)


class Sampler:
    """What both samplers do: divide the prompts over the ranks, and gather the responses."""

    ranks_per_engine = 1  # consecutive ranks that answer together

    def sample(
        self, prompts: list[list[int]], n: int, seed: tuple[int, ...] = (0,), progress=None, known=None, keep=None
    ) -> list[Response]:
        """n responses per prompt; response j of prompt i is at index i * n + j, and its random numbers are those of
        (*seed, i, j). Every rank passes the same prompts, answers its share and gets all the responses. `progress` is a
        tqdm over responses.

        keep({i: the n responses of prompt i}) is called as prompts are finished, on the (first) rank that answers them.
        Handed back as `known`, the same on every rank, they are not sampled again, and the others come out the same."""
        engine, engines = parallel.rank() // self.ranks_per_engine, parallel.world_size() // self.ranks_per_engine
        mine = [i for i in range(engine, len(prompts), engines) if i not in (known or {})]
        answers = {}

        def finished(places: list[int], responses: list[Response]) -> None:
            some = {mine[place]: responses[k * n : (k + 1) * n] for k, place in enumerate(places)}
            answers.update(some)
            if keep and parallel.rank() % self.ranks_per_engine == 0:
                keep(some)

        self._sample([prompts[i] for i in mine], n, [(*seed, i) for i in mine], progress, finished)
        answers = (known or {}) | parallel.merge(answers)
        return [response for i in range(len(prompts)) for response in answers[i]]
