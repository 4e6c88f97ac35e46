# docs/data.md
"""From the cells of a row to a problem: what is asked, behind which messages, and what the answer is."""

import ast
import math
import re
from decimal import Decimal

from infra.cli import UsageError, require
from infra.grader import last_boxed, reference_answer

SYSTEM_COLUMNS = ("system", "system_prompt")
MAX_DIGITS = 1000  # of a number as an answer, written out
SEVERAL_BOXES = "solutions with several different boxes, of which the last counts"
UNUSABLE = f"answers that are no text, number of at most {MAX_DIGITS} digits, or list of one, taken for none"
UNREADABLE_BOX = "answers with a \\boxed that cannot be read, taken for none"
BARE_BOX = "answers from a \\boxed without braces, whose one character or command counts"
# `\boxed 2` and `\boxed\pi`, with nothing behind it that may belong to it, as in `\boxed 12` or `\boxed\frac12`
BARE = re.compile(r"\\boxed\s*(?:\\[A-Za-z]+|[^\s\\{}$])(?=\s|\$|\\[\])]|[.,;:!?)](?!\d)|\Z)")


def cell(row: dict, column: str):
    """A row's value in a column; `a.b` is key b of the object in column a, where no column is called `a.b`."""
    if column in row:
        return row[column]
    for key in column.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def chat_text(content) -> str | None:
    """The text of a message: a text, or a list of parts that are all text. None for anything else."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") if part.get("type", "text") == "text" else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def read_prompt(row: dict, column: str, where: str) -> tuple[str, tuple]:
    """(text of the problem, earlier messages) of a row. Raises UsageError for what is neither a text nor a chat whose last
    message is the user's."""
    prompt, messages = cell(row, column), []
    if isinstance(prompt, list):
        known = all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") for m in prompt)
        form = "a list of chat messages with role (system, user or assistant) and content"
        require(prompt and known, f"{where}: {column} must be a text, or {form}")
        messages = [{"role": m["role"], "content": chat_text(m.get("content"))} for m in prompt]
        require(all(m["content"] is not None for m in messages), f"{where}: {column} has a message whose content is no text")
        require(
            messages[-1]["role"] == "user",
            f"{where}: {column} ends with the {messages[-1]['role']}'s message; the last one must be the user's. "
            f"Move a solution to a column solution, and leave out the beginning of a response",
        )
        require(all(m["role"] != "system" for m in messages[1:]), f"{where}: {column} has a system message behind others")
        prompt = messages.pop()["content"]
    require(isinstance(prompt, str) and prompt.strip(), f"{where}: {column} must be a text or a list of chat messages")
    written = re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", prompt)
    require(not written, f"{where}: {column} is a chat written out as text; give it as a list, in .jsonl or .parquet")
    for name in SYSTEM_COLUMNS:
        system = row.get(name)
        require(system is None or isinstance(system, str), f"{where}: {name} must be a text")
        if system and system.strip():
            first = messages[0] if messages and messages[0]["role"] == "system" else None
            other = first is not None and first["content"] != system
            require(not other, f"{where}: {name} and the chat have different system messages; leave one out")
            messages = messages if first else [{"role": "system", "content": system}, *messages]
    try:
        "".join([prompt, *(m["content"] for m in messages)]).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: {column} holds half of a surrogate pair, which is no character; repair it") from None
    return prompt, tuple(messages)


def is_blank(value) -> bool:
    """Whether a cell says nothing: null, nan, or white space."""
    return value is None or isinstance(value, str) and not value.strip() or isinstance(value, float) and math.isnan(value)


def answer_text(value) -> str | None:
    """An answer as text: numbers plainly and exactly (1e-05 is 0.00001, 8.0 is 8), the one element of a list, also of one
    written out as text (['7']). None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", value.strip(), re.DOTALL):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return value
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, Decimal) and value.is_finite() and abs(value.adjusted()) < MAX_DIGITS:
        text = f"{value:f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text) if value else "0"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**MAX_DIGITS:
        return str(value)
    return value if isinstance(value, str) else None


def read_answer(row: dict, columns) -> tuple[str | None, str | None]:
    """(reference answer or None, what was wrong with it or None) of a row."""
    value = next((value for column in columns if not is_blank(value := cell(row, column))), None)
    if value is None:
        return None, None
    text = answer_text(value)
    if is_blank(text):
        return None, UNUSABLE
    answer = reference_answer(text)
    parts = re.split(r"(?=\\boxed(?![A-Za-z]))", text)[1:] if "####" not in text else []  # each begins with a box
    bare = bool(parts) and last_boxed(parts[-1]) is None
    if not answer or "\\boxed" in answer or bare and not BARE.match(parts[-1]):
        return None, UNREADABLE_BOX
    if len({reference_answer(part) for part in parts}) > 1:
        return answer, SEVERAL_BOXES
    return answer, BARE_BOX if bare else None
