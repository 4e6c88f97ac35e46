# docs/grader.md
r"""Grades responses against reference answers, 1.0 or 0.0 each: one grader for reward and evaluation alike.

The graded answer is the last \boxed{...} of a response; a response without a usable one scores 0 and is counted.
kind="math"   equal as mathematics. Identical strings and plain numbers are settled here, exactly; everything else is
              repaired (grader_latex.py) and read by math-verify in child processes (grader_worker.py). Model output can
              keep sympy busy for ever, inside C code too, so the kernel kills such a worker at the deadline (score 0,
              counted) and a new one takes its place.
kind="boxed"  string equality of the box and the answer, as in the reward of the paper's authors.

    with Grader() as grader:
        rewards = grader.grade([r"... so it is \boxed{\frac12}"], ["0.5"])  # [1.0]
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from infra.grader_latex import scientific
from infra.grader_readings import SEVERAL, another_form, readings, words_of

MAX_ANSWER_CHARS = 1000  # a longer box is unparsable and never reaches sympy; MATH-500's longest reference has 53
MAX_WORDS = 3  # of a reference in words: a name or a choice, not a sentence
CACHED_VERDICTS = 20_000  # some 25 MB at worst
NUMBER = re.compile(r"([-+]?)(?:\\?\$)?([1-9][0-9]{0,2}(?:(?:,|(?:\{,\}|\\,|,\\!) ?)[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac ?\{([0-9]+)\} ?\{([0-9]+)\}|([0-9]+) ?/ ?([0-9]+))")
# what math-verify drops: the base of 52_8, the power of \text{ cm}^2
LABEL = re.compile(r"(?:[0-9]_|\\(?:text|mbox|mathrm)\{[^{}]*\}\^)\{?([0-9]+)")


def last_boxed(text: str, bare: bool = False) -> str | None:
    r"""Contents of the last \boxed{...}, braces balanced; None if there is none or it never closes.

    Only the very last \boxed counts: if it is cut off or has no braces (`\boxed 5`), no earlier one stands in for it.
    `\boxed{}` gives "". As in TeX, `\{` and `\}` are not braces and `\boxedfoo` is another command.
    bare: without braces, `\boxed 5`, the next character or command is the contents, as TeX has it.
    """
    start = text.rfind(r"\boxed")
    while start >= 0 and text[start + 6 : start + 7].isalpha():
        start = text.rfind(r"\boxed", 0, start)
    opening = re.compile(r"\s*\{").match(text, start + 6) if start >= 0 else None
    if bare and start >= 0 and not opening:
        token = re.compile(r"\s*(\\[A-Za-z]+|[^\s\\}$])").match(text, start + 6)
        return token and token[1]
    depth = 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()) if opening else ():
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[opening.end() : token.start()]
    return None


def reference_answer(text: str) -> str:
    r"""What a data set's column means: GSM8K's closing `#### 1,234`, a solution's last box, `\boxed 2` too, or the text."""
    if closing := re.search(r"(?:^|\n)####([^\n]+)\Z", text.rstrip()):
        answer = closing[1].strip()
        return answer.lstrip("$").replace(",", "") if NUMBER.fullmatch(answer) else answer
    return (last_boxed(text, bare=True) or text).strip()


def plain_number(text: str) -> Fraction | None:
    r"""Value of an integer, a decimal or a fraction of integers (`+1,234.50`, `\$18`, `\frac{3}{4}`, `3/4`), else None.

    No exponents: a value is never longer than its text, and that is at most MAX_ANSWER_CHARS.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if match := FRACTION.fullmatch(text):
        sign, top, bottom = match[1], int(match[2] or match[4]), int(match[3] or match[5])
    elif (match := NUMBER.fullmatch(text)) and (match[2] or match[3]):
        sign, decimals = match[1], match[3] or ""
        top, bottom = int(re.sub(r"[^0-9]", "", match[2]) + decimals), 10 ** len(decimals)
    else:
        return None
    return Fraction(-top if sign == "-" else top, bottom) if bottom else None


def normalize(text: str) -> str:
    r"""Drops what cannot change the meaning: runs of white space, the size of a \dfrac, one pair of enclosing $, a closing
    full stop."""
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", " ".join(text.split()))
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return text.removesuffix(".").rstrip()


def same_at_sight(answer: str, prediction: str) -> bool | None:
    """True or False where that takes no mathematics, else None."""
    if answer == prediction:
        return True
    a, b = plain_number(answer), plain_number(prediction)
    if a is not None and b is not None:
        both = answer + prediction
        rounded = "." in both and ("/" in both or "frac" in both)  # math-verify takes 0.333333 for 1/3
        return a == b or (None if rounded and abs(a - b) < abs(a) / 1000 else False)
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if (a := scientific(answer)) and (b := scientific(prediction)):
        return a == b
    labels = LABEL.findall(answer), LABEL.findall(prediction)
    return False if all(labels) and labels[0] != labels[1] else None


class Grader:
    """Calls from several threads take turns. The counters add up over the grader's life:

    unparsable  responses without a usable box: none, cut off, empty, or longer than MAX_ANSWER_CHARS
    timeouts    responses scored 0 because their answer could not be judged: a worker killed at the deadline, or a crash
    """

    uses_labels = True

    def __init__(self, kind: str = "math", timeout: float = 5.0, workers: int = 2, memory_gb: float = 2.0):
        if kind not in ("math", "boxed"):
            raise ValueError(f"kind must be 'math' or 'boxed', not {kind!r}")
        if timeout <= 0 or workers < 1 or memory_gb <= 0:
            raise ValueError(f"must be positive: {timeout=}, {workers=}, {memory_gb=}")
        self.tidy = normalize if kind == "math" else str.strip
        self.kind, self.workers, self.unparsable, self.timeouts = kind, workers, 0, 0
        self.pid, self.lock = os.getpid(), threading.Lock()
        # -P: no file of this folder, which may be called like a library's module, is imported in its place
        self.command = [sys.executable, "-P", str(Path(__file__).resolve().with_name("grader_worker.py")), "--worker"]
        self.command += [str(self.pid), str(timeout), str(memory_gb)]
        self.pool: ThreadPoolExecutor | None = None  # starts, with the workers, when the first answer needs them
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.judge = lru_cache(CACHED_VERDICTS)(self._judge)

    def grade(self, responses: list[str], answers: list[str]) -> list[float]:
        """Scores in the order of `responses`.

        Verdicts are kept, time-outs too: the worst case is timeout / workers seconds per distinct hostile answer.
        """
        if os.getpid() != self.pid:
            raise RuntimeError("this Grader was made before a fork and belongs to the parent: make one in this process")
        pairs = []  # (answer, prediction); None without a usable box
        for response, answer in zip(responses, answers, strict=True):
            prediction = (last_boxed(response) or "").strip()
            prediction = self.tidy(prediction) if len(prediction) <= MAX_ANSWER_CHARS else ""
            pairs.append((self.tidy(answer), prediction) if prediction else None)
        with self.lock:
            self.unparsable += pairs.count(None)
            if self.kind == "boxed":
                return [float(pair is not None and pair[0] == pair[1]) for pair in pairs]
            verdicts = {pair: same_at_sight(*pair) for pair in pairs if pair}
            hard = [pair for pair, verdict in verdicts.items() if verdict is None]
            verdicts.update(zip(hard, self._all(self.judge, hard), strict=True))
            verdicts[None] = False
            self.timeouts += sum(verdicts[pair] is None for pair in pairs)
            return [float(verdicts[pair] is True) for pair in pairs]

    def gradable(self, answers: list[str]) -> list[bool]:
        """Whether a response can match the reference at all: found by grading each against another form of itself.

        Not gradable: sentences, several labelled answers, and what math-verify cannot read. With kind="boxed" all are.
        """
        if self.kind == "boxed":
            return [True] * len(answers)
        tidied = [self.tidy(answer) for answer in answers]
        verdicts = {answer: self._at_sight(answer) for answer in tidied}
        hard = [answer for answer, verdict in verdicts.items() if verdict is None]
        with self.lock:
            verdicts.update(zip(hard, self._all(self._readable, hard), strict=True))
        return [bool(verdicts[answer]) for answer in tidied]

    @staticmethod
    def _at_sight(answer: str) -> bool | None:
        if not answer or len(answer) > MAX_ANSWER_CHARS or SEVERAL.search(answer):
            return False
        words = words_of(answer)
        return True if plain_number(answer) is not None else None if words is None else len(words.split()) <= MAX_WORDS

    def _all(self, function, items: list) -> list:
        """function(item) for each, in the threads of the workers, which start here when they are first needed."""
        if items and not self.pool:
            self.pool = ThreadPoolExecutor(self.workers, "grader")
            for _ in range(self.workers):
                self.idle.put(Worker(self.command))
        return list(self.pool.map(function, items)) if items else []

    def _judge(self, pair: tuple[str, str]) -> bool | None:
        return self._ask(pair, False)

    def _readable(self, answer: str) -> bool | None:
        return self._ask((answer, another_form(answer)), True)

    def _ask(self, pair: tuple[str, str], read: bool) -> bool | None:
        try:
            pairs = readings(*pair)
        except Exception:  # a fault of the repairs, on a text that nobody thought of: no reason to end a run
            return None
        if not pairs:
            return False
        worker = self.idle.get()
        try:
            return worker.ask(pairs, read)
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """Ends the workers. They also end by themselves once this process is gone, however it went."""
        with self.lock:
            if self.pool and os.getpid() == self.pid:
                self.pool.shutdown()
                self.pool = None
                while not self.idle.empty():
                    self.idle.get().stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Worker:
    """A child process that has imported math-verify, nothing of the caller's, and answers one question at a time."""

    def __init__(self, command: list[str]):
        self.command = command
        self.start()

    def start(self) -> None:
        # a session of its own: Ctrl-C is for the trainer, whose end is then also the worker's
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii", start_new_session=True
        )
        self.ready = False

    def stop(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError), self.process:  # closes the pipes and waits
            pass

    def ask(self, pairs: list[tuple[str, str]], read: bool) -> bool | None:
        """Whether one of the pairs is equal, as grader_objects.judge says; None if the worker died over it."""
        if self.process.poll() is not None:  # while idle: not this answer's doing
            self.stop()
            self.start()
        if not self.ready and self.process.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("the grading worker did not start (pip install math-verify?): see its error above")
        self.ready = True
        line = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([pairs, read]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        reply = json.loads(line) if line.endswith("\n") else {"equal": None, "retire": True}
        if reply["retire"]:
            self.stop()
            self.start()
        return reply["equal"]
