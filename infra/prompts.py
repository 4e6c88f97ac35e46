# docs/data.md
"""The one renderer of prompts: from a problem through a chat template to token ids, looked at before they are used."""

import functools

from infra.cli import UsageError, require
from infra.hub import first_line

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@functools.cache
def say_once(message: str) -> None:
    print(message, flush=True)


def apply_template(tokenizer, messages, **options) -> str:
    """Messages ({"role", "content"}, a text) through the chat template, as text that holds every system and user message. A
    template that loops over content parts gets them. Raises whatever the template does, or ValueError for a lost message."""
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    refusal = None
    for given in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(given, tokenize=False, **options)
        except Exception as error:  # jinja's, those of the Python inside it, or the template's own raise_exception
            refusal = refusal or error
            continue
        lost = [m["role"] for m in messages if m["role"] != "assistant" and m["content"].strip() not in text]
        if not lost and (given is messages or "'type'" not in text):  # else the parts were printed, not read
            return text
        refusal = refusal or ValueError(f"it leaves out the {(lost or ['user'])[0]}'s message")
    raise refusal


def render_text(tokenizer, problem, instruction: str, thinking: bool, flag: str, **variables) -> str:
    """The prompt as text. `variables` go to the template. Raises UsageError for a template that fails or leaves a message
    out."""
    text = problem.text if not instruction or "\\boxed" in problem.text else f"{problem.text}\n{instruction}"
    messages = [*problem.messages, {"role": "user", "content": text}]
    try:
        return apply_template(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking, **variables)
    except Exception as error:
        fix = (
            f"take messages out of the data (here {', '.join(m['role'] for m in messages)}), or " if problem.messages else ""
        )
        raise UsageError(
            f"{flag} {tokenizer.name_or_path}: its chat template does not render {problem.where or 'the problem'} "
            f"({first_line(error)}); {fix}repair chat_template.jinja in that folder, or use an instruct checkpoint"
        ) from None


def render_prompt(tokenizer, problem, instruction: str, thinking: bool, flag: str = "--model") -> list[int]:
    """Token ids of the chat prompt, ending where the assistant's response begins. The instruction follows the problem
    on its own line unless the problem already asks for a box. `flag` names the tokenizer's model in errors."""
    prompt = render_text(tokenizer, problem, instruction, thinking, flag)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def render_all(tokenizer, problems, instruction: str, thinking: bool, flag: str = "--model") -> list[list[int]]:
    """`render_prompt` of each, and a warning if the template makes the same command render differently tomorrow, or if the
    tokenizer has no ids for something."""
    rendered = [render_prompt(tokenizer, problem, instruction, thinking, flag) for problem in problems]
    model = f"{flag} {tokenizer.name_or_path}"
    for problem in problems[:1]:
        today, other = [
            render_text(tokenizer, problem, instruction, thinking, flag, **variables)
            for variables in ({}, {"strftime_now": lambda format: "another day"})
        ]
        if today != other:
            say_once(
                f"warning: {model}: its chat template writes the date into every prompt, so the same command gives other "
                f"prompts tomorrow; put a fixed date for strftime_now(...) into chat_template.jinja"
            )
    unknown = [p for p, ids in zip(problems, rendered, strict=True) if tokenizer.unk_token_id in ids]
    if unknown:
        say_once(f"warning: {model}: its tokenizer cannot spell {len(unknown)} problems (first: {unknown[0].where})")
    return rendered


def policy_flag(args) -> str:
    """The flag of the model whose responses are sampled in training."""
    return "--student" if hasattr(args, "student") else "--model"


def render_prompts(args, problems, tokenizers, thinking):
    """Render every problem of --train-data with each tokenizer, the policy's and then the teacher's; a problem too
    long for any one of them is dropped. thinking: whether that tokenizer's template opens a thinking block.

    Returns (kept problems, [prompt ids of the kept problems] for each tokenizer). Raises UsageError if none is left."""
    flag, max_prompt_tokens = "--train-data", args.max_prompt_tokens
    rendered = [
        render_all(tok, problems, args.instruction, think, of)
        for tok, think, of in zip(tokenizers, thinking, (policy_flag(args), "--teacher"), strict=False)
    ]
    longest = [max(lengths) for lengths in zip(*[[len(ids) for ids in one] for one in rendered], strict=True)]
    keep = [i for i, length in enumerate(longest) if length <= max_prompt_tokens]
    require(
        keep,
        f"{flag}: all {len(problems)} prompts are longer than --max-prompt-tokens {max_prompt_tokens} "
        f"(shortest {min(longest)}); raise it",
    )
    if len(keep) < len(problems):
        first = next(p for p, length in zip(problems, longest, strict=True) if length > max_prompt_tokens)
        print(
            f"{flag}: {len(problems) - len(keep)} of {len(problems)} problems dropped, longer than "
            f"--max-prompt-tokens {max_prompt_tokens} (first: {first.where})"
        )
    return [problems[i] for i in keep], [[one[i] for i in keep] for one in rendered]
