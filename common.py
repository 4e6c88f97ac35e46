# docs/common.md
"""Plumbing that fails silently when two copies of it differ, so it lives here once: reading problems, rendering
prompts, loading models, sampling, batching, evaluation, logging, checkpoints. The algorithms are in the scripts."""

import functools
import json
import math
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
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
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

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
    """Something the user typed cannot work. The message names the flag and the fix."""


def run(main, args_class) -> None:
    """Parse the command line into `args_class` and call `main(args)`; a UsageError is one line and exit code 2."""
    try:
        main(tyro.cli(args_class, description=sys.modules[main.__module__].__doc__))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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


def problem_stream(count: int, seed: int):
    """Endless indices 0..count-1: one fresh permutation after another, so every epoch sees every problem once."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def benchmark_name(spec: str) -> str:
    """Folder name of a benchmark: a file's stem, or the hub spec without its slashes and colons."""
    return Path(spec).stem if spec.endswith((".jsonl", ".json", ".parquet")) else re.sub("[/:]", "_", spec)


# ---------------------------------------------------------------------------------------------- models
def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def load_model(path: str, flag: str, device, dtype: torch.dtype, trainable: bool):
    """Causal LM in eval mode (no dropout, whose noise would break the importance ratio). Trainable weights are float32
    masters (float64 under --dtype float64); frozen ones are stored in the compute dtype."""
    try:
        master = torch.float32 if trainable and dtype == torch.bfloat16 else dtype
        options = {"dtype": master, "use_safetensors": True, "trust_remote_code": False}
        model = from_hub(lambda: AutoModelForCausalLM.from_pretrained(path, **options), path).to(device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise explain_missing(flag, path, error) from None
    try:
        head_weight(model)
    except ValueError as error:
        raise UsageError(f"{flag} {path}: {error}; use a Qwen or Llama checkpoint") from None
    return model.requires_grad_(trainable)


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


def response_hidden(model, prompts: list[list[int]], responses: list[list[int]]):
    """Final hidden states that predict the response tokens, packed row after row without padding.

    Returns (hidden (N, H), ids (N,)) with N the sum of response lengths. Right padding needs no attention mask in a
    causal model: no real token can see it."""
    B, T = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids, predicts = torch.zeros((B, T), dtype=torch.long), torch.zeros((B, T), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        predicts[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True  # position t predicts token t + 1
    hidden = model.base_model(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state  # (B, T, H)
    ids = torch.cat([torch.tensor(response) for response in responses]).to(model.device)
    return hidden[predicts.to(model.device)], ids  # (N, H), (N,)


def evaluate(sampler, tokenizer, prompts, answers, grader) -> dict[str, float]:
    """One response per problem with the training sampler: a learning curve, not a benchmark (that is eval_math.py)."""
    responses = sampler.sample(prompts, 1)
    rewards = grader.grade([tokenizer.decode(r.ids, skip_special_tokens=True) for r in responses], answers)
    lengths = [len(r.ids) for r in responses]
    return {"eval/accuracy": float(np.mean(rewards)), "eval/response_length": float(np.mean(lengths))}


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
    return tqdm(total=total, desc=name, unit=unit, delay=0.1, mininterval=0.5 if sys.stderr.isatty() else 20)


class Run:
    """The run folder: metrics.jsonl (one object a step), run.json, a copy of the script, and a progress bar."""

    def __init__(self, args, total_steps: int):
        require(not finished(args.out), f"--out {args.out}: holds a finished run; choose another folder or delete it")
        self.out, self.start = make_out(args.out), time.time()
        shutil.copy(sys.argv[0], self.out)
        self.labels = set()  # texts of the problems whose reference answer was consulted for a reward
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
            },
        }
        self._write_record()
        self.metrics = (self.out / "metrics.jsonl").open("w")
        self.bar = progress_bar(total_steps, self.out.name, "step")
        self.tensorboard = self.wandb = None
        if getattr(args, "tensorboard", False):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard needs a package: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(self.out)
        if getattr(args, "wandb", False):
            try:
                import wandb
            except ImportError:
                raise UsageError("--wandb needs a package: pip install wandb") from None
            self.wandb = wandb.init(project="sparse-to-dense", name=self.out.name, config=asdict(args))

    def note(self, **entries) -> None:
        """Add entries to run.json."""
        self.record |= entries
        self._write_record()

    def _write_record(self):
        (self.out / "run.json").write_text(json.dumps(self.record, indent=2))

    def log(self, step: int, metrics: dict[str, float], bar: str = "") -> None:
        """Append one object to metrics.jsonl. `bar` is the text behind the progress bar."""
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
        """Save the checkpoint (if a model is given), then mark run.json finished: the last write of a run."""
        self.bar.close()
        self.metrics.close()
        if model is not None:
            save_checkpoint(model, tokenizer, self.out, dtype)
        self.record |= {
            "finished": True,
            "wall_time_s": round(time.time() - self.start, 1),
            "labels_used": len(self.labels),
            **extra,
        }
        self._write_record()
        print(f"wrote {self.out}/ in {self.record['wall_time_s']:.0f} s")


class StopRules:
    """Ends a run that goes wrong: the checkpoint is saved, run.json says why and stays unfinished, the exit code is 3."""

    EXIT_CODE = 3

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

    def stop(self, reason: str) -> None:
        self.run.bar.close()
        save_checkpoint(*self.saved)
        self.run.note(stopped=reason)
        print(f"stopped at {reason}\nsaved the weights so far to {self.run.out}/", file=sys.stderr)
        sys.exit(self.EXIT_CODE)


def save_checkpoint(model, tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Ordinary Hugging Face checkpoint in the compute dtype, the precision in which it was sampled from."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
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
