# docs/samplers.md
"""The vllm sampler: an engine in the trainer's own process and on its GPU, behind the contract of sampler.py.

The engine holds a copy of the weights. `update_weights` writes the trainer's into it, and every rollout proves it: a fixed
probe is sampled among its prompts, and the log-probabilities that the engine gives it must be the trainer's (the canary), or
the run stops before a response is handed out."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: tensors are handed over, and it cannot outlive the script
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a sync with tied embeddings warns every time

import numpy as np  # noqa: E402
import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from infra import lora, parallel  # noqa: E402
from infra.batches import response_hidden  # noqa: E402
from infra.cli import RunStopped  # noqa: E402
from infra.models import autocast, compute_device  # noqa: E402
from infra.sampler import Response, Sampler, eos_token_ids, make_response, vocabulary_size  # noqa: E402
from kernels import fused_linear_logprob  # noqa: E402

PROBE_RESPONSE = 16  # tokens, behind a prompt one token longer than a cache block: a shorter one misses a stale prefix
PROBE_ROOM = 176  # tokens that fit into the engine whatever the run's own lengths are; blocks have 16 on most GPUs
CPU_BLOCK = 32  # tokens; vLLM's own choice for a CPU, 128, makes the probe longer and samples no faster
CANARY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.12}  # mean |difference|; a 135 M model has 1e-5 and up to 0.063
CPU_CACHE_BYTES = 512 << 20  # on a GPU it is what --vllm-gpu-memory-utilization leaves


class CanaryError(RunStopped):
    """The engine's log-probabilities are not the trainer's: it samples from other weights, or computes something else."""


class VLLMSampler(Sampler):
    """Samples from a vLLM engine. `dtype` is bfloat16 or float32.

    With a `model` the engine starts from its weights, and every rollout checks that it has those of the last
    `update_weights`. Without one it reads the checkpoint `path` itself, and nothing is left to compare it with.

    Under torchrun every rank builds one, behind init_process_group; `tp` consecutive ranks share the weights and answer
    together."""

    def __init__(
        self,
        path,
        tokenizer,
        dtype,
        model=None,
        *,
        longest_prompt,
        max_response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        gpu_memory_utilization=None,
        tp=1,
        sleep=False,
        canary_tolerance=None,
    ):
        on_gpu, torchrun = torch.cuda.is_available(), "RANK" in os.environ
        self.dtype, self.sleeps, self.asleep, self.tokenizer_size = dtype, sleep, False, vocabulary_size(tokenizer)
        self.ranks_per_engine = tp if torchrun else 1
        self.canary_tolerance = CANARY_TOLERANCE[dtype] if canary_tolerance is None else canary_tolerance
        self.model, self.canary_logprob_diff, self.syncs = None, 0.0, 0
        threads = torch.get_num_threads()
        overrides = {"head_dtype": "float32"}  # logits as the trainer's losses make them, of a head in `dtype`
        if model is not None:
            overrides["tie_word_embeddings"] = model.config.tie_word_embeddings  # as loaded, which may not be as configured
        self.llm = LLM(
            path,
            dtype=str(dtype).removeprefix("torch."),
            load_format="auto" if model is None else "dummy",
            hf_overrides=overrides,
            max_model_len=max(longest_prompt + max_response_tokens, PROBE_ROOM),
            skip_tokenizer_init=True,  # ids in, ids out
            logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p: those it was drawn with
            tensor_parallel_size=tp,
            distributed_executor_backend="external_launcher" if torchrun else None,
            enforce_eager=not on_gpu,
            enable_chunked_prefill=None if on_gpu else False,  # there, a seeded prompt in two pieces ends in an error
            block_size=None if on_gpu else CPU_BLOCK,
            enable_sleep_mode=sleep and on_gpu,
            gpu_memory_utilization=gpu_memory_utilization or 0.9,
            kv_cache_memory_bytes=None if on_gpu else CPU_CACHE_BYTES,
        )
        if on_gpu:  # on a CPU vLLM binds the threads to cores, and this call does nothing
            torch.set_num_threads(threads)  # vLLM leaves one for all that the script still does on the CPU
        self.params = SamplingParams(
            max_tokens=max_response_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            logprobs=0,  # of the sampled id alone
            flat_logprobs=True,
            stop_token_ids=eos_token_ids(self.llm.model_config.try_get_generation_config().get("eos_token_id"), tokenizer),
            ignore_eos=True,  # the ids above are all there are, as for the hf sampler
            detokenize=False,
        )
        words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        block = self.llm.llm_engine.vllm_config.cache_config.block_size
        self.probe = np.random.default_rng(0).choice(words, block + 1).tolist()
        self.probe_params = SamplingParams(
            max_tokens=PROBE_RESPONSE, logprobs=0, flat_logprobs=True, ignore_eos=True, seed=0, detokenize=False
        )
        if model is not None:
            self.update_weights(model)

    def sleep(self) -> None:
        """Give the engine's GPU memory to the trainer until `update_weights` (with --vllm-sleep; else nothing)."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)  # drops weights and cache: both are made anew
            self.asleep = True

    @torch.no_grad()
    def update_weights(self, model) -> None:
        """Sample from the weights of `model` from now on; `sample` raises CanaryError if the engine does not.

        Collective under torchrun: sharded parameters (DTensor) are gathered one by one, on every rank."""
        if self.asleep:
            torch.cuda.empty_cache()  # what training has freed, torch still holds
            self.llm.wake_up(["weights"])
        weights = ((name, tensor.to(self.dtype)) for name, tensor in lora.plain_weights(model))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if model.config.tie_word_embeddings and not torch.cuda.is_available():
            self.llm.apply_model(repack_head)
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():  # it holds keys and values of the old weights
            raise CanaryError("vLLM could not empty its prefix cache, which holds keys and values of the old weights")
        self.model = model
        self.syncs += 1

    def _sample(self, prompts: list[list[int]], n: int, seeds: list[tuple], progress, finished) -> None:
        prompts, params = list(prompts), [self._params(n, seed) for seed in seeds]
        checked = self.model is not None and self.canary_tolerance > 0
        if checked:  # among the prompts the probe costs next to nothing; alone it would cost an engine step a token
            prompts, params = [self.probe, *prompts], [self.probe_params, *params]
            [probe], *outputs = self._generate(prompts, params, progress)
            self.canary(list(probe.token_ids), probe.logprobs.logprobs)
            finished(list(range(len(outputs))), [self._response(o) for output in outputs for o in output])
        else:  # nothing to wait for: a prompt is finished when its responses are, whatever else the engine is at
            self._generate(prompts, params, progress, finished)

    def _response(self, output) -> Response:
        ids, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
        return make_response(ids, logprobs, output.finish_reason == "length", self.tokenizer_size)

    @torch.no_grad()
    def canary(self, response: list[int], sampler_logprobs: list[float]) -> None:
        """Score with the trainer's model what the engine said behind the probe. Raises CanaryError if they disagree."""
        with autocast(compute_device(self.model), self.dtype):
            logprobs, _ = fused_linear_logprob(*response_hidden(self.model, [self.probe], [response]))  # (R,)
        parallel.reshard(self.model)
        diff = (logprobs.cpu() - torch.tensor(sampler_logprobs)).abs()  # (R,)
        self.canary_logprob_diff = float(parallel.all_reduce(diff.mean(), largest=True))  # ranks stop together
        if not self.canary_logprob_diff <= self.canary_tolerance:  # nan fails too
            sync = self.syncs - 1  # the first is that of the initial weights
            when = f"after step {sync} of this run" if sync else "before the first step"
            self.on_stale(
                f"weight sync {sync} ({when}) failed: vLLM's log-probabilities of a fixed probe differ from the "
                f"trainer's by {self.canary_logprob_diff:.2g} in the mean (at most {float(diff.max()):.2g}), above "
                f"--canary-tolerance {self.canary_tolerance}. It samples from other weights than those that train; see "
                f"docs/samplers.md"
            )

    def on_stale(self, reason: str) -> None:
        """What a failed canary calls. A script puts its stop rule here, which saves the trainer's weights first."""
        raise CanaryError(reason)

    def _params(self, n: int, seed: tuple[int, ...]):
        params = self.params.clone()
        params.n = n
        params.seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) % (2**31 - n)  # vLLM gives response j seed + j
        return params

    def _generate(self, prompts, params, progress=None, finished=None):
        """The n outputs of each prompt, in order. Continuous batching: vLLM decides what runs together. finished([place of a
        prompt], its responses) is called for each as it ends."""
        requests = self.llm.enqueue([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        places = {request.partition("-")[0]: place for place, request in enumerate(requests)}  # vLLM adds a random part
        outputs = [None] * len(prompts)
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    place = places[output.request_id]
                    outputs[place] = sorted(output.outputs, key=lambda o: o.index)
                    if progress is not None and output.prompt_token_ids != self.probe:
                        progress.update(len(output.outputs))
                    if finished:
                        finished([place], [self._response(o) for o in outputs[place]])
        return outputs


def repack_head(model) -> None:
    """On a CPU vLLM multiplies with a packed copy of the head, which a sync of the embedding it is tied to leaves stale."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
