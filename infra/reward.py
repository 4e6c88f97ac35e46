# docs/grader.md
"""What rewards a response: the grader of mathematics, or a function of one's own, named on the command line.

    --grader math                  equal as mathematics to the reference answer (infra/grader.py)
    --grader boxed                 the same string in the box
    --grader my_reward.py:brevity  a function of your own; its parameters are some of

        response (str)   the text that was sampled, special tokens left out
        problem (str)    the text of the problem: the last user message, without --instruction
        answer (str)     the reference answer: a function that names it uses labels, and the data must have them

It returns a finite number, the higher the better. It is called in the trainer's process, one response at a time.

`answer` is read as for the grader (infra/columns.py, docs/data.md): of a text what its closing #### or its last box says,
else all of it; a number written plainly; the element of a list of one. A list of several or an object is no answer, and the
problem is left out. Other columns, token ids, length and truncation are not handed over: edit a copy of grpo.py for these.
"""

import importlib.util
import inspect
import math
from pathlib import Path

from infra import dataset, parallel
from infra.cli import UsageError, require
from infra.grader import Grader

PARAMETERS = ("response", "problem", "answer")


def make_grader(spec: str):
    """The grader that --grader names. Raises UsageError where it is none, or its file does not hold such a function."""
    return Grader(spec) if spec in ("math", "boxed") else OwnReward(spec)


def references(grader, problems) -> list:
    """What the grader is given beside the responses: the problems for a reward of one's own, else their answers."""
    return problems if isinstance(grader, OwnReward) else [problem.answer for problem in problems]


def report_ungradable(grader, problems) -> None:
    """Say how many reference answers no response can match, and the first of them."""
    labeled = [problem for problem in problems if problem.answer]
    if not isinstance(grader, OwnReward):
        dataset.report_ungradable(labeled, parallel.on_rank_zero(grader.gradable, [p.answer for p in labeled]))


class OwnReward:
    """A reward of one's own; `grade` takes problems where Grader takes their answers."""

    unparsable = timeouts = 0

    def __init__(self, spec: str):
        path, _, name = spec.rpartition(":")
        require(path.endswith(".py"), f"--grader {spec}: choose math, boxed, or FILE.py:FUNCTION")
        require(Path(path).is_file(), f"--grader {spec}: there is no file {path}")
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(Path(path).stem, path))
        try:
            module.__spec__.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"--grader {spec}: {path} cannot be loaded ({type(error).__name__}: {error})") from error
        self.function, self.spec = getattr(module, name, None), spec
        require(callable(self.function), f"--grader {spec}: {path} has no function {name}")
        self.parameters = list(inspect.signature(self.function).parameters)
        others = [one for one in self.parameters if one not in PARAMETERS]
        require(not others, f"--grader {spec}: {name} may take {', '.join(PARAMETERS)}, not {', '.join(others)}")
        self.uses_labels = "answer" in self.parameters

    def grade(self, responses: list[str], problems) -> list[float]:
        """Rewards in the order of `responses`. Raises UsageError where the function gives no finite number."""
        rewards = []
        for response, problem in zip(responses, problems, strict=True):
            given = {"response": response, "problem": problem.text, "answer": problem.answer}
            reward = self.function(**{one: given[one] for one in self.parameters})
            try:
                rewards.append(float(reward))
            except (TypeError, ValueError):
                rewards.append(math.nan)
            require(math.isfinite(rewards[-1]), f"--grader {self.spec}: gave {reward!r} for the response {response[:80]!r}")
        return rewards

    def close(self) -> None:
        """There is nothing to end."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
