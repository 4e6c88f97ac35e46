# docs/common.md
"""Plumbing that fails silently when two copies of it differ, so it lives here once: the command line, loading and saving
models, sampling, batching, evaluation. Problems and prompts are in dataset.py, a run's record is in run_folder.py; the
algorithms are in the scripts."""

import contextlib
import functools
import importlib.util
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers.utils
import tyro
from safetensors import SafetensorError
from tqdm import tqdm

# kernels/ shadows Hugging Face's package of that name. Where that one is installed as well, transformers would look for
# its contents in ours and fail to import, so it is told, before anything else of it is imported, that there is none.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import parallel  # noqa: E402
from grader import Grader  # noqa: E402, F401  (scripts reach grader and sampler through here)
from kernels import head_weight  # noqa: E402
from samplers import HFSampler, autocast  # noqa: E402, F401

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
RETRY_WAITS = (1, 3)  # seconds between tries of a hub that fails, on top of its client's own
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------- command line
class UsageError(ValueError):
    """Something the user typed cannot work. The message names the flag and the fix. Exit code 2."""


class RunStopped(RuntimeError):
    """A run that ends before its last step for a reason that the message gives. Exit code 3."""


def run(main, args_class) -> None:
    """Parse the command line into `args_class` and call `main(args)`; a UsageError or RunStopped is one line. Under
    torchrun one rank's failure is reported once and ends all of them."""
    parallel.setup()
    quiet = contextlib.redirect_stderr(None) if parallel.rank() else contextlib.nullcontext()
    with quiet:  # what is wrong with the command line is wrong on every rank
        args = tyro.cli(args_class, description=sys.modules[main.__module__].__doc__)
    try:
        main(args)
    except (UsageError, RunStopped) as error:
        parallel.report_failure(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 3)
    except Exception:
        parallel.exit_on_failure()
        raise
    parallel.barrier()  # no rank leaves while another still needs it


def require(condition, message: str) -> None:
    """Raise UsageError(message) unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_positive(args, names: str) -> None:
    """Raise UsageError unless each of the named fields of `args` (separated by spaces) is above 0 or not given (None)."""
    for name in names.split():
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: must be above 0")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def progress_bar(total: int, name: str, unit: str) -> tqdm:
    """A bar on a terminal; a line every so often in a log file."""
    often = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc=name, unit=unit, delay=0.1, mininterval=often, disable=parallel.rank() > 0)


# ---------------------------------------------------------------------------------------------- the hub
@functools.cache
def go_offline_without_network() -> None:
    """Without a network the hub's clients retry for minutes; offline, they read their caches or fail at once."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for last in (False, True):
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
            return
        except Exception:  # requests' or httpx's, by version
            time.sleep(0 if last else RETRY_WAITS[0])
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def from_hub(load, path: str):
    """load(), tried again a few times where the hub, or the way to it, failed for a reason that may pass."""
    from huggingface_hub import constants

    if Path(path).exists():
        return load()
    go_offline_without_network()
    for wait in (*RETRY_WAITS, None):
        try:
            return load()
        except Exception as error:
            if wait is None or constants.HF_HUB_OFFLINE or not may_pass(error):
                raise
            print(f"{path}: {first_line(error)}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is a failed connection or a busy server: not a wrong name or token."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search("Timeout|Connect|Protocol", type(error).__name__):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------------------------------- models
def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, DTYPES[dtype]


def explain_missing(flag: str, path: str, error: Exception) -> UsageError:
    if "custom code" in str(error):
        return UsageError(f"{flag} {path}: brings its own code, which is never run; use a Qwen or Llama checkpoint")
    return UsageError(
        f"{flag} {path}: cannot load it as a local checkpoint folder or from the Hugging Face hub "
        f"({first_line(error)}). Check the path, or the network and the hub id"
    )


def load_tokenizer(path: str, flag: str):
    """Tokenizer of a hub id or local folder. Raises UsageError if it is missing or has no chat template."""
    try:
        tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
    except (OSError, ValueError) as error:
        raise explain_missing(flag, path, error) from None
    require(
        tokenizer.chat_template,
        f"{flag} {path}: its tokenizer has no chat template; use an instruct checkpoint, "
        f"or add chat_template.jinja to the folder",
    )
    require(
        tokenizer.eos_token_id is not None,
        f"{flag} {path}: its tokenizer has no eos_token; set one in tokenizer_config.json",
    )
    if tokenizer.pad_token_id is None:  # only ever used outside of every mask
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, flag: str, device, dtype: torch.dtype, trainable: bool, hybrid_shard=False, offload=False):
    """Causal LM in eval mode (no dropout, whose noise would break the importance ratio). Trainable weights are float32
    masters (float64 under --dtype float64); frozen ones are stored in the compute dtype. Sharded if there are ranks.
    With `offload` it waits in the CPU's memory: sharded weights are fetched layer by layer, a whole model by `move`."""
    master = torch.float32 if trainable and dtype == torch.bfloat16 else dtype

    def load():
        return AutoModelForCausalLM.from_pretrained(path, dtype=master, use_safetensors=True, trust_remote_code=False)

    try:
        if parallel.world_size() == 1:
            model = from_hub(load, path).to("cpu" if offload else device)
        else:
            model = parallel.load_sharded(path, lambda: from_hub(load, path), master, dtype, hybrid_shard, offload)
    except (OSError, ValueError, SafetensorError) as error:
        raise explain_missing(flag, path, error) from None
    try:
        head_weight(model)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: {error}; use a Qwen or Llama checkpoint") from None
    return model.eval().requires_grad_(trainable)


def count_params(*models) -> list[int]:
    """Parameters of each model, tied ones once, over all shards."""
    return [sum(p.numel() for p in model.parameters()) for model in models]


def move(model, device) -> None:
    """Move a whole model; a sharded one has its place, or with `offload` moves itself."""
    if parallel.world_size() == 1:
        model.to(device)


def enable_gradient_checkpointing(model) -> None:
    """Recompute activations in backward. Transformers does so in train mode only; the supported models have no dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def save_model(model, tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Ordinary Hugging Face checkpoint in the compute dtype, the precision in which it was sampled from."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = parallel.full_tensor(tensor)  # every rank takes part, rank 0 keeps it
        if parallel.rank() == 0:
            state[name] = whole.to(dtype).cpu()
    if parallel.rank():
        return
    if model.config.tie_word_embeddings:  # the cast gave the head storage of its own; it is saved once, as the embedding
        state = {name: t for name, t in state.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(out, state_dict=state)
    model.config.dtype = dtype  # save_pretrained writes that of the master weights
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---------------------------------------------------------------------------------------------- batches and scoring
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


def choose_sampler(args, training: bool = True) -> None:
    """Replace `--sampler auto` by what it means here. Raises UsageError if the vllm sampler cannot work."""
    installed = importlib.util.find_spec("vllm") is not None
    if args.sampler == "auto":
        args.sampler = "vllm" if torch.cuda.is_available() and installed else "hf"
        if torch.cuda.is_available() and not installed:
            print("--sampler auto: vllm is not installed, so the slower hf samples; pip install -r requirements.txt")
    if args.sampler == "vllm":
        require(installed, "--sampler vllm: vllm is not installed; pip install -r requirements.txt, or use --sampler hf")
        require(args.dtype != "float64", "--dtype float64: vllm does not compute in it; use --sampler hf")
        utilization = args.vllm_gpu_memory_utilization
        require(0 < utilization < 1, f"--vllm-gpu-memory-utilization {utilization}: must lie between 0 and 1")
        world = int(
            os.environ.get("WORLD_SIZE", 1 if training else args.vllm_tp)
        )  # vllm itself starts what torchrun did not
        require(
            args.vllm_tp >= 1 and world % args.vllm_tp == 0,
            f"--vllm-tp {args.vllm_tp}: must divide the number of ranks, here {world} (torchrun --nproc-per-node)",
        )


def make_sampler(args, model, path, tokenizer, dtype, longest_prompt, **sampling):
    """The sampler of samplers.py that --sampler names, behind choose_sampler. With `model` None the vllm sampler reads the
    checkpoint `path` itself. `longest_prompt`: tokens of the longest one it will get."""
    if args.sampler == "hf":
        return HFSampler(model, tokenizer, dtype, batch_tokens=args.rollout_batch_tokens, **sampling)
    limit = AutoConfig.from_pretrained(path).max_position_embeddings
    require(
        longest_prompt + args.max_response_tokens <= limit,
        f"--max-response-tokens {args.max_response_tokens}: with the longest prompt ({longest_prompt} tokens) it exceeds "
        f"the {limit} positions of {path}; lower it, or use --sampler hf",
    )
    from sampler_vllm import VLLMSampler

    return VLLMSampler(
        path,
        tokenizer,
        dtype,
        model,
        longest_prompt=longest_prompt,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tp=args.vllm_tp,
        sleep=getattr(args, "vllm_sleep", False),
        canary_tolerance=getattr(args, "canary_tolerance", None),
        **sampling,
    )


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
    forward = getattr(model, "hooked_base_model", model.base_model)  # the former gathers a sharded model's weights
    hidden = forward(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state  # (B, T, H)
    ids = torch.cat([torch.tensor(response, dtype=torch.long) for response in responses]).to(hidden.device)
    return hidden[predicts.to(hidden.device)], model.get_output_embeddings().weight, ids  # (N, H), (V, H), (N,)


def clip_gradients(model, max_norm: float) -> float:
    """Scale the gradient to a norm of at most `max_norm`; returns the norm before, over all ranks' shards."""
    return float(parallel.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))


def grade(grader, tokenizer, response_ids: list[list[int]], answers) -> list[float]:
    """Rewards of the responses, 0 or 1 each, from the grader of rank 0."""
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return parallel.on_rank_zero(grader.grade, texts, answers)


def evaluate(sampler, tokenizer, prompts, answers, grader, seed: tuple[int, ...]) -> dict[str, float]:
    """One response per problem with the training sampler: a learning curve, not a benchmark (that is eval_math.py)."""
    responses = sampler.sample(prompts, 1, seed)
    rewards = grade(grader, tokenizer, [r.ids for r in responses], answers)
    lengths = [len(r.ids) for r in responses]
    return {"eval/accuracy": float(np.mean(rewards)), "eval/response_length": float(np.mean(lengths))}


@functools.cache
def drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, count): how often each of `count` is drawn in `count` draws with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)


def bootstrap_ci95(values: np.ndarray, resamples: int = 10_000) -> list[float]:
    """95 % percentile interval of the mean of `values` (S, P), or (P,) for one seed: seeds and problems drawn with
    replacement, each by itself."""
    values = np.atleast_2d(values)
    seeds, problems = (drawn(count, resamples, axis) for axis, count in enumerate(values.shape))  # (R, S), (R, P)
    means = ((seeds @ values) * problems).sum(1) / values.size
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]
