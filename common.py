# docs/common.md
"""Plumbing that fails silently when two copies of it differ, so it lives here once: reading problems, rendering
prompts, loading models, sampling, batching, evaluation, logging, checkpoints. The algorithms are in the scripts."""

import contextlib
import fcntl
import functools
import importlib.util
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
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

import checkpoint  # noqa: E402
import parallel  # noqa: E402
from grader import Grader, reference_answer  # noqa: E402, F401  (scripts reach grader and sampler through here)
from kernels import head_weight  # noqa: E402
from samplers import HFSampler, autocast  # noqa: E402, F401

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PACKAGES = ("torch", "transformers", "vllm", "datasets", "numpy", "tyro", "math-verify")
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


# ---------------------------------------------------------------------------------------------- problems and prompts
@dataclass(frozen=True)
class Problem:
    text: str  # the problem itself, or the last user message of a chat prompt
    messages: tuple  # earlier chat messages (a system prompt, say), each {"role", "content"}
    answer: str | None  # reference answer; None for data without labels


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


def load_rows(spec: str, flag: str) -> list[dict]:
    """Rows of a local .jsonl / .json / .parquet file, or of a hub dataset `name`, `name:config`, `name:config:split`."""
    path = Path(spec)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
        import datasets

        if path.suffix in (".json", ".parquet"):
            return list(datasets.load_dataset(path.suffix[1:], data_files=spec, split="train"))
        name, config, split = (spec.split(":", 2) + [None, None])[:3]
        if config is None:
            configs = from_hub(lambda: datasets.get_dataset_config_names(name), name)
            config = next((c for c in ("default", "all") if c in configs), configs[0] if len(configs) == 1 else None)
            require(config, f"{flag} {spec}: choose a config, {flag} {name}:CONFIG, one of {', '.join(configs)}")
        return list(from_hub(lambda: datasets.load_dataset(name, config, split=split or "train"), name))
    except UsageError:
        raise
    except Exception as error:  # a missing file, bad JSON, no network: all end the same way for the user
        raise UsageError(
            f"{flag} {spec}: cannot read it as a local .jsonl/.parquet file or a hub dataset ({first_line(error)}). "
            f"Check the path, or the network and the name:config:split"
        ) from None


def load_problems(spec: str, flag: str, need_answers: bool) -> list[Problem]:
    """Distinct problems of a dataset, in its order. Raises UsageError for a missing column or an empty dataset."""
    rows = load_rows(spec, flag)
    require(rows, f"{flag} {spec}: the dataset is empty; give one with at least one problem")
    require(all(isinstance(row, dict) for row in rows), f"{flag} {spec}: every line must be a JSON object")
    columns = sorted(rows[0])
    text_key = next((k for k in ("problem", "question", "prompt") if k in rows[0]), None)
    require(text_key, f"{flag} {spec}: needs a column problem, question or prompt; it has {', '.join(columns)}")
    problems = {}
    for number, row in enumerate(rows, 1):
        prompt, messages, reward_model = row.get(text_key), (), row.get("reward_model")
        if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
            *messages, last = prompt  # a chat list, as in DAPO-Math-17k
            prompt = last["content"]
        require(
            isinstance(prompt, str) and prompt,
            f"{flag} {spec}: row {number}: {text_key} must be a text or a list of chat messages",
        )
        truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
        candidates = (row.get("answer"), row.get("solution"), truth)
        answer = next((candidate for candidate in candidates if candidate is not None), None)
        answer = None if answer is None else reference_answer(str(answer))
        problems.setdefault(prompt, Problem(prompt, tuple(messages), answer))
    problems = list(problems.values())
    if need_answers:
        labeled = [p for p in problems if p.answer]
        require(
            labeled,
            f"{flag} {spec}: needs a column answer, solution or reward_model.ground_truth with the "
            f"reference answers; it has {', '.join(columns)}",
        )
        if len(labeled) < len(problems):
            print(f"{flag} {spec}: {len(problems) - len(labeled)} problems without an answer left out")
        problems = labeled
    return problems


def mean_rewards(spec: str, flag: str) -> dict[str, float]:
    """{problem: mean reward of its responses} of the generations.jsonl `spec` of eval_math.py."""
    by_problem = {}
    for row in load_rows(spec, flag):
        known = isinstance(row, dict) and {"problem", "reward"} <= row.keys()
        require(known, f"{flag} {spec}: needs problem and reward in every row; give a generations.jsonl of eval_math.py")
        by_problem.setdefault(row["problem"], []).append(row["reward"])
    return {problem: float(np.mean(rewards)) for problem, rewards in by_problem.items()}


def paced_weights(spec: str, problems: list[Problem]) -> list[float]:
    """p(1 - p) of every problem (arXiv 2603.11178), p its pass rate in the generations.jsonl `spec` of eval_math.py."""
    rewards = mean_rewards(spec, "--paced")
    missing = sum(p.text not in rewards for p in problems)
    require(
        not missing,
        f"--paced {spec}: lacks {missing} of the {len(problems)} problems; make it by running eval_math.py on --train-data",
    )
    pass_rates = [rewards[p.text] for p in problems]
    require(
        any(0 < p < 1 for p in pass_rates),
        f"--paced {spec}: every problem is passed always or never, so all weights are 0; raise eval_math.py's --samples",
    )
    return [p * (1 - p) for p in pass_rates]


def render_prompt(tokenizer, problem: Problem, instruction: str, thinking: bool) -> list[int]:
    """Token ids of the chat prompt, ending where the assistant's response begins. The instruction follows the problem
    on its own line unless the problem already asks for a box."""
    text = problem.text if not instruction or "\\boxed" in problem.text else f"{problem.text}\n{instruction}"
    messages = [*problem.messages, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=thinking, tokenize=True, return_dict=False
    )


def render_prompts(tokenizers, problems, instruction, thinking, max_prompt_tokens: int | None, flag: str):
    """Render every problem with each of the (tokenizer, thinking) pairs; a problem too long for any one is dropped.

    Returns (kept problems, [prompt ids of the kept problems] for each tokenizer). Raises UsageError if none is left."""
    rendered = [
        [render_prompt(tok, p, instruction, think) for p in problems]
        for tok, think in zip(tokenizers, thinking, strict=True)
    ]
    longest = [max(lengths) for lengths in zip(*[[len(ids) for ids in one] for one in rendered], strict=True)]
    keep = [i for i, length in enumerate(longest) if max_prompt_tokens is None or length <= max_prompt_tokens]
    require(
        keep,
        f"{flag}: all {len(problems)} prompts are longer than --max-prompt-tokens {max_prompt_tokens} "
        f"(shortest {min(longest)}); raise it",
    )
    if len(keep) < len(problems):
        print(
            f"{flag}: {len(problems) - len(keep)} of {len(problems)} problems dropped, longer than "
            f"--max-prompt-tokens {max_prompt_tokens}"
        )
    return [problems[i] for i in keep], [[one[i] for i in keep] for one in rendered]


class ProblemStream:
    """Indices 0..count-1 without end, one fresh permutation after another, so that every epoch sees every problem once.
    `position` is how many were taken; setting it continues a run."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.position = count, seed, 0

    def take(self, k: int) -> list[int]:
        epochs = range(self.position // self.count, (self.position + k - 1) // self.count + 1)
        indices = np.concatenate([np.random.default_rng((self.seed, epoch)).permutation(self.count) for epoch in epochs])
        start = self.position % self.count
        self.position += k
        return indices[start : start + k].tolist()


def benchmark_name(spec: str) -> str:
    """Folder name of a benchmark: a file's stem, or the hub spec without its slashes and colons."""
    return Path(spec).stem if spec.endswith((".jsonl", ".json", ".parquet")) else re.sub("[/:]", "_", spec)


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


# ---------------------------------------------------------------------------------------------- run folder
def make_out(out: str | Path) -> Path:
    """The output folder, made if need be. Raises UsageError where nothing can be written."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error.strerror}); choose another folder") from None
    return Path(out)


def finished(out: str | Path) -> dict | None:
    """run.json of a finished run in folder `out`, else None."""
    path = Path(out) / "run.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("finished") else None


def progress_bar(total: int, name: str, unit: str) -> tqdm:
    """A bar on a terminal; a line every so often in a log file."""
    often = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc=name, unit=unit, delay=0.1, mininterval=often, disable=parallel.rank() > 0)


class Run:
    """The run folder: metrics.jsonl (one object a step), run.json, a copy of the script, checkpoints, a progress bar.
    Rank 0 writes it; the other ranks keep the same books and write nothing."""

    def __init__(self, args, total_steps: int):
        if args.resume and finished(args.out):  # a requeued job: the same line finds nothing left to do
            require_same_run(args, Path(args.out))
            print(f"{args.out}/ is finished")
            sys.exit(0)
        require(not finished(args.out), f"--out {args.out}: holds a finished run; choose another folder or delete it")
        self.args, self.out, self.start = args, make_out(args.out), time.time()
        self.total_steps = total_steps
        self.resumed_from = checkpoint.latest(self.out)
        worth = [path for path in (self.resumed_from, *self.out.glob("rollouts*.jsonl")) if path]
        require(
            args.resume or not worth,
            f"--out {args.out}: holds an unfinished run ({', '.join(path.name for path in worth)}); go on with it by "
            f"--resume, or choose another folder",
        )
        if worth:
            require_same_run(args, self.out)
        self.labels = set()  # texts of the problems whose reference answer was consulted for a reward
        split = args.label_split and load_problems(args.label_split, "--label-split", need_answers=True)
        self.label_split = {p.text for p in split} if split else None
        self.spent = Counter()  # optimizer updates, sampled tokens, FLOPs
        self.record = {
            "finished": False,
            "command": command_line(),
            "args": asdict(args),
            "preflight": None,
            "stopped": None,
            "git_revision": git_revision(),
            "packages": {name: version(name) for name in PACKAGES},
            "hardware": {
                "cpu": platform.processor() or platform.machine(),
                "cpu_threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "ranks": parallel.world_size(),
            },
        }
        self.metrics = self.bar = self.tensorboard = self.wandb = None
        parallel.barrier()  # every rank has looked at the folder before rank 0 writes to it
        if parallel.rank():
            return
        self.lock = lock_folder(self.out)
        shutil.copy(sys.argv[0], self.out)
        self._write_record()
        last_step = checkpoint.step(self.resumed_from)
        keep_metrics(self.out, last_step)
        self.metrics = (self.out / "metrics.jsonl").open("a")
        self.bar = progress_bar(total_steps, self.out.name, "step")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard needs a package: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(self.out, purge_step=last_step + 1)
        if args.wandb:
            try:
                import wandb
            except ImportError:
                raise UsageError("--wandb needs a package: pip install wandb") from None
            self.wandb = wandb.init(project="sparse-to-dense", name=self.out.name, config=asdict(args))

    def resume(self, model, optimizer, stream: ProblemStream) -> int:
        """Load the newest checkpoint, if there is one, into all three. Returns its step, else 0."""
        if not self.resumed_from:
            return 0
        state = checkpoint.restore(self.resumed_from, model, optimizer)
        stream.position, self.labels, self.spent = state["position"], set(state["labels"]), Counter(state["spent"])
        print(f"resumed from {self.resumed_from}")
        return state["step"]

    def checkpoint(self, step: int, model, optimizer, stream: ProblemStream) -> None:
        """Every --save-every steps, except behind the last one: what `resume` needs. Raises RunStopped if the disk is
        full."""
        if not self.args.save_every or step % self.args.save_every or step == self.total_steps:
            return
        state = {"step": step, "position": stream.position, "labels": sorted(self.labels), "spent": self.spent}
        try:
            checkpoint.save(self.out, model, optimizer, state, self.args.keep_last)
        except OSError as error:
            whole, free = checkpoint.latest(self.out), shutil.disk_usage(self.out).free / 1e9
            raise RunStopped(
                f"--out {self.out}: {error} ({free:.1f} GB free there). "
                + (f"{whole} is whole: make room, then run the same command with --resume" if whole else "Make room")
            ) from None

    def consult(self, problems) -> None:
        """Enter problems into the ledger before their answers decide a reward. Raises RunStopped for one that is not in
        --label-split."""
        texts = {problem.text for problem in problems}
        outside = texts - self.label_split if self.label_split is not None else set()
        if outside:
            reason = f"a label outside --label-split {self.args.label_split}: {min(outside)[:80]!r}"
            self.note(stopped=reason)
            raise RunStopped(f"{self.out}: {reason}; nothing was learned from it. Take --train-data from that file")
        self.labels |= texts

    def spend(self, updates: int = 0, sampled_tokens: int = 0, flops: float = 0) -> None:
        """Count what training costs, for run.json. FLOPs are 2 a parameter and token forward and 4 more backward, attention
        itself left out (Kaplan et al. 2020, arXiv 2001.08361, table 1)."""
        self.spent.update(updates=updates, sampled_tokens=sampled_tokens, flops=flops)

    def note(self, **entries) -> None:
        """Add entries to run.json."""
        self.record |= entries
        if parallel.rank() == 0:
            self._write_record()

    def _write_record(self):
        (self.out / "run.json").write_text(json.dumps(self.record, indent=2))

    def log(self, step: int, metrics: dict[str, float], bar: str = "") -> None:
        """Append one object to metrics.jsonl. `bar` is the text behind the progress bar."""
        if parallel.rank():
            return
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics.flush()
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        self.bar.set_postfix_str(bar, refresh=False)
        self.bar.update(step - self.bar.n)

    def finish(self, model=None, tokenizer=None, dtype=None, **extra) -> None:
        """Save the model (if one is given), then mark run.json finished: the last write of a run. Nothing is left to
        resume, so the checkpoints go."""
        if model is not None:
            save_model(model, tokenizer, self.out, dtype)
        if parallel.rank():
            return
        self.bar.close()
        self.metrics.close()
        (self.out / "labels.json").write_text(json.dumps(sorted(self.labels)))
        self.record |= {
            "finished": True,
            "wall_time_s": round(time.time() - self.start, 1),
            "labels_used": len(self.labels),
            "updates": self.spent["updates"],
            "sampled_tokens": self.spent["sampled_tokens"],
            "flops": self.spent["flops"],
            **extra,
        }
        self._write_record()
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        print(f"wrote {self.out}/ in {self.record['wall_time_s']:.0f} s")


def lock_folder(out: Path):
    """An open file that keeps other processes out of `out` until this one ends. Raises UsageError if one is at work."""
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"--out {out}: another process is writing there; wait for it, stop it, or choose another") from None
    return file


def rank_zero_file(path: Path, lines: list[str]):
    """`path` open for writing, holding `lines`; on the other ranks what is written goes nowhere."""
    file = open(os.devnull if parallel.rank() else path, "w")
    file.writelines(lines)
    return file


def require_same_run(args, out: Path) -> None:
    """Raise UsageError if the run in `out` was started with another model, other data or another seed; print whatever
    else is new."""
    before, now = json.loads((out / "run.json").read_text())["args"], json.loads(json.dumps(asdict(args)))
    changed = {name: f"--{name.replace('_', '-')} was {before.get(name)}, now {now[name]}" for name in now}
    changed = {name: text for name, text in changed.items() if before.get(name) != now[name] and name != "resume"}
    fixed = [changed[name] for name in ("model", "teacher", "student", "train_data", "rollouts", "seed") if name in changed]
    require(not fixed, f"--resume: {'; '.join(fixed)}: repeat the flags of {out}, or choose another --out")
    if changed:
        print(f"--resume with changed flags: {'; '.join(changed.values())}")


def keep_metrics(out: Path, last_step: int) -> None:
    """Cut metrics.jsonl behind `last_step`, the step to go on from: later rows are of steps that run again."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() and last_step else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step))


class StopRules:
    """Ends a run that goes wrong: the weights are saved, run.json says why and stays unfinished. Every rank must see the
    same values, because all of them save."""

    def __init__(self, args, run, model, tokenizer, dtype):
        self.args, self.saved, self.run, self.steps_truncated = args, (model, tokenizer, run.out, dtype), run, 0

    def unless_finite(self, step: int, **values) -> None:
        """Stop at a nan or inf. Called before the optimizer's step, so that it never reaches the weights that are saved."""
        bad = {name: float(value) for name, value in values.items() if not math.isfinite(value)}
        if bad:
            names = " and ".join(f"{name} {value}" for name, value in bad.items())
            self.stop(
                f"step {step}: {names}; the update was not applied. Lower --learning-rate, or look at the step's data "
                f"and at --dtype"
            )

    def if_truncated(self, step: int, truncated_frac: float) -> None:
        """Stop after --stop-patience steps in a row with a truncated_frac above --stop-truncated-frac (0: never)."""
        bound, patience = self.args.stop_truncated_frac, self.args.stop_patience
        self.steps_truncated = self.steps_truncated + 1 if bound and truncated_frac > bound else 0
        if bound and self.steps_truncated >= patience:
            self.stop(
                f"step {step}: charts/truncated_frac above {bound:g} for {patience} steps: responses do not end. Raise "
                f"--max-response-tokens, check the EOS ids with --preflight-only, or set --stop-truncated-frac 0"
            )

    def watch(self, sampler) -> None:
        """Stop when the sampler's canary finds, within a rollout, that it does not sample from the trainer's weights."""
        sampler.on_stale = self.stop

    def stop(self, reason: str) -> None:
        save_model(*self.saved)
        self.run.note(stopped=reason)
        raise RunStopped(f"stopped at {reason}. Saved the weights so far to {self.run.out}/")


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


def command_line() -> str:
    """The command that runs this process, as a user would type it in the repository."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except OSError:
        return None
