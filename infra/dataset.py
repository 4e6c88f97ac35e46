# docs/data.md
"""From a dataset to prompts: reading problems, their order, the one renderer of prompts."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra.cli import UsageError, require
from infra.grader import reference_answer
from infra.hub import first_line, from_hub

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    text: str  # the problem itself, or the last user message of a chat prompt
    messages: tuple  # earlier chat messages (a system prompt, say), each {"role", "content"}
    answer: str | None  # reference answer; None for data without labels


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


def load_problems(spec: str, flag: str, need_answers: bool, prompt_column=None, answer_column=None) -> list[Problem]:
    """Distinct problems of a dataset, in its order; without column names, from the first of the usual ones that it has.
    Raises UsageError for a missing column or an empty dataset."""
    rows = load_rows(spec, flag)
    require(rows, f"{flag} {spec}: the dataset is empty; give one with at least one problem")
    require(all(isinstance(row, dict) for row in rows), f"{flag} {spec}: every line must be a JSON object")
    columns = sorted(rows[0])
    for column, name in ((prompt_column, "--prompt-column"), (answer_column if need_answers else None, "--answer-column")):
        require(column is None or column in rows[0], f"{name} {column}: {flag} {spec} has only {', '.join(columns)}")
    text_key = prompt_column or next((k for k in ("problem", "question", "prompt") if k in rows[0]), None)
    needed = "a column problem, question or prompt (or --prompt-column)"
    require(text_key, f"{flag} {spec}: needs {needed}; it has {', '.join(columns)}")
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
        candidates = (row.get(answer_column),) if answer_column else (row.get("answer"), row.get("solution"), truth)
        answer = next((candidate for candidate in candidates if candidate is not None), None)
        answer = None if answer is None else reference_answer(str(answer))
        problems.setdefault(prompt, Problem(prompt, tuple(messages), answer))
    problems = list(problems.values())
    if need_answers:
        labeled = [p for p in problems if p.answer]
        require(
            labeled,
            f"{flag} {spec}: needs a column answer, solution or reward_model.ground_truth with the "
            f"reference answers (or --answer-column); it has {', '.join(columns)}",
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


def render_prompts(args, problems, tokenizers, thinking):
    """Render every problem of --train-data with each tokenizer; a problem too long for any one of them is dropped. thinking:
    whether that tokenizer's template opens a thinking block.

    Returns (kept problems, [prompt ids of the kept problems] for each tokenizer). Raises UsageError if none is left."""
    flag, max_prompt_tokens = "--train-data", args.max_prompt_tokens
    rendered = [
        [render_prompt(tok, p, args.instruction, think) for p in problems]
        for tok, think in zip(tokenizers, thinking, strict=True)
    ]
    longest = [max(lengths) for lengths in zip(*[[len(ids) for ids in one] for one in rendered], strict=True)]
    keep = [i for i, length in enumerate(longest) if length <= max_prompt_tokens]
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


def write_problems(path: Path, problems: list[Problem], source: str) -> str:
    """Write problems as chat prompts, answers too where they have one; returns the path as text. Raises UsageError where
    the file holds others than those of `source`."""
    rows = [{"prompt": [*p.messages, {"role": "user", "content": p.text}]} for p in problems]
    rows = [row | ({} if p.answer is None else {"answer": p.answer}) for row, p in zip(rows, problems, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    require(
        not path.exists() or path.read_text(encoding="utf-8") == text,
        f"{path}: holds other problems than {source}; choose another --out",
    )
    path.write_text(text, encoding="utf-8")
    return str(path)


def split_labels(spec: str, flag: str, folder: Path) -> tuple[str, str]:
    """Split the problems of `spec` into files of 80 % and 20 %, shuffled with seed 42; returns FOLDER/train.jsonl and
    FOLDER/heldout.jsonl. Raises UsageError where these hold other problems."""
    problems = load_problems(spec, flag, need_answers=True)
    random.Random(42).shuffle(problems)
    cut = len(problems) * 4 // 5
    parts = {"train": problems[:cut], "heldout": problems[cut:]}
    return tuple(write_problems(folder / f"{name}.jsonl", part, f"{flag} {spec}") for name, part in parts.items())


def benchmark_name(spec: str) -> str:
    """Folder name of a benchmark: a file's stem, or the hub spec without its slashes and colons."""
    return Path(spec).stem if spec.endswith((".jsonl", ".json", ".parquet")) else re.sub("[/:]", "_", spec)
