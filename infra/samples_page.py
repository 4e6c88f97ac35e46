# docs/telemetry.md
"""Responses for human eyes. Of a run: samples.jsonl, and samples.html, which colours every token by its KL. Of an
evaluation: samples.html, which shows wrong answers first.

samples = Samples(run.out, tokenizer, every=20, colour_by="reverse_kl")
samples.keep(step, micro_batch, response_ids, reverse_kl=stats.reverse_kl)   # in the loop over micro-batches
samples.write(step, problems, responses, grader)                             # once a step
"""

import json
from html import escape
from pathlib import Path

from infra import parallel
from infra.files import whole_rows, write_aside
from infra.grader import last_boxed
from infra.reward import references

RESPONSES = 4  # the first of a step's batch
PAGE_STEPS = 6  # the page shows the first sampled step and the latest others; samples.jsonl has them all
PAGE_TOKENS = 2000  # of a response on the page
PAGE_WRONG, PAGE_RIGHT = 16, 8  # problems on the page of an evaluation
LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats: a token has the level of the highest bound it reaches
COLOURS = {
    "reverse_kl": "KL(student ‖ teacher)",
    "forward_kl": "KL(teacher ‖ student)",
    "surprisal": "surprisal, −log p of the policy",
}


class Samples:
    """The samples of one run. `every` is --sample-every: step 1 and every multiple are written; 0 turns both files off.

    colour_by: the per-token quantity that colours the page, a key of COLOURS."""

    def __init__(self, out: Path, tokenizer, every: int, colour_by: str):
        self.out, self.tokenizer, self.every, self.colour_by = Path(out), tokenizer, every, colour_by
        self.kept = {}  # row of the batch: {name: value of each token}

    def due(self, step: int) -> bool:
        return bool(self.every) and (step == 1 or step % self.every == 0)

    def keep(self, step: int, micro_batch: list[int], response_ids: list[list[int]], **per_token) -> None:
        """Per-token values (N,) of a micro-batch: `micro_batch` are rows of the batch, `response_ids` those rows' ids."""
        if not self.due(step) or min(micro_batch, default=RESPONSES) >= RESPONSES:
            return
        lengths = [len(ids) for ids in response_ids]
        split = {name: values.detach().float().cpu().split(lengths) for name, values in per_token.items()}
        for j, k in enumerate(micro_batch):
            if k < RESPONSES:
                self.kept[k] = {name: [round(v, 4) for v in rows[j].tolist()] for name, rows in split.items()}

    def write(self, step: int, problems, responses, grader=None, rewards=None, advantages=None) -> None:
        """Append the step's first responses to samples.jsonl and make samples.html anew. The lists have an entry per
        response of the batch (dataset.Problem, sampler.Response). Without `rewards`, `grader` marks the few where there is
        a reference answer. The colour "surprisal" needs no `keep`: it is that of the sampler.

        What the file holds of this step or later ones comes from a run that was cut short, and is replaced."""
        if not self.due(step):
            return
        if self.colour_by == "surprisal":
            shown = enumerate(responses[:RESPONSES])
            self.kept = {k: {"surprisal": [round(-value, 4) for value in r.sampler_logprobs]} for k, r in shown}
        kept, self.kept = parallel.merge(self.kept), {}
        if parallel.rank():
            return
        path = self.out / "samples.jsonl"
        rows = [row for row in whole_rows(path) if row["step"] < step]
        for k in sorted(kept):
            tokens = token_texts(self.tokenizer, responses[k].ids)
            response, reward = "".join(tokens), rewards[k] if rewards is not None else None
            if rewards is None and grader and (problems[k].answer or not grader.uses_labels):
                [reward] = grader.grade([response], references(grader, [problems[k]]))
            row = {
                "step": step,
                "problem": problems[k].text,
                "response": response,
                "truncated": bool(responses[k].truncated),
                "reward": None if reward is None else float(reward),
                "advantage": None if advantages is None else round(float(advantages[k]), 4),
                "tokens": tokens,
                "values": kept[k],
            }
            rows.append(row)
        write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
        steps = sorted({row["step"] for row in rows})
        shown = {*steps[:1], *steps[1:][1 - PAGE_STEPS :]}
        html = page(self.out.name, [row for row in rows if row["step"] in shown], self.colour_by)
        write_aside(self.out / "samples.html", html)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text. Where several tokens make up one character, the last of them has it."""
    texts, shown, held = [], [], []
    for i in ids:
        held.append(i)
        text = tokenizer.decode(shown + held)[len(tokenizer.decode(shown)) :]  # alone, some tokens would lose their space
        if text.endswith("\ufffd") and len(held) < 4:
            texts.append("")
        else:
            texts.append(text)
            shown, held = held, []
    return texts


# ---------------------------------------------------------------------------------------------- the page
STYLE = """
:root { color-scheme: light dark; --heat: 214 69 20; --page: #fbfaf8; --card: #fff; --ink: #22201d; --soft: #77716a;
        --line: #e6e1da }
@media (prefers-color-scheme: dark) {
  :root { --heat: 240 104 52; --page: #16171a; --card: #1e2024; --ink: #e4e1dc; --soft: #969089; --line: #33353b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.2rem 5rem; max-width: 62rem; background: var(--page); color: var(--ink);
       font: 15px/1.55 system-ui, sans-serif; overflow-x: clip }
h1 { font-size: 1.4rem; margin: 0 0 .3rem } h2 { font-size: 1rem; margin: 2.2rem 0 .6rem } p { margin: .3rem 0 }
.soft { color: var(--soft) }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; margin-top: .8rem; font-size: .85rem }
.legend .t { padding: .1rem .55rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem;
          margin: .8rem 0 }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .1rem 0 .5rem; font-size: .85rem; color: var(--soft) }
.facts b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .8rem;
           color: var(--soft) }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .8rem; font: 14px/1.75 ui-monospace, Menlo, monospace }
.t { position: relative; border-radius: 3px; padding: .12em 0; background: rgb(var(--heat) / var(--a, 0)) }
.l1 { --a: .09 } .l2 { --a: .2 } .l3 { --a: .34 } .l4 { --a: .52 } .l5 { --a: .74; color: #fff } .l6 { --a: 1; color: #fff }
.t i { font-style: normal; opacity: .45 }
.tokens .t:hover { outline: 2px solid var(--ink) }
.tokens .t:hover::after { content: attr(data-t); position: absolute; z-index: 1; left: 50%; top: 1.9em;
  transform: translateX(-50%); width: max-content; white-space: pre; padding: .45rem .7rem; border-radius: 7px;
  background: var(--ink); color: var(--page); font: 12px/1.5 ui-monospace, Menlo, monospace; pointer-events: none }
"""


def evaluation_page(name: str, rows: list[dict], samples: int, tokens_of=None) -> str:
    """The page of one benchmark: some responses, wrong ones from the hardest problem on, then right ones from the easiest
    on. rows: as in generations.jsonl, `samples` of each problem in a row. tokens_of(k): texts and surprisals (nats)
    of the tokens of row k; without it the text stands without colours."""
    right = [sum(row["reward"] for row in rows[first : first + samples]) for first in range(0, len(rows), samples)]
    order = sorted(range(len(right)), key=lambda i: right[i])
    credited = [[row["reward"] > 0 for row in rows[first : first + samples]] for first in range(0, len(rows), samples)]
    failed = [i for i in order if not all(credited[i])]
    passed = [i for i in reversed(order) if any(credited[i])]
    shown = []
    for verdict, found, most in (("wrong", failed, PAGE_WRONG), ("right", passed, PAGE_RIGHT)):
        chosen = found if len(found) <= most else [found[i * len(found) // most] for i in range(most)]
        for i in chosen:
            k = next(k for k in range(i * samples, (i + 1) * samples) if (rows[k]["reward"] > 0) == (verdict == "right"))
            tokens, surprisal = tokens_of(k) if tokens_of else ([rows[k]["response"]], [])
            box = last_boxed(rows[k]["response"])
            shown.append(
                rows[k]
                | {
                    "heading": f"{verdict.capitalize()} answers: {len(chosen)} of {len(found)} problems that have one",
                    "verdict": f"{verdict}, {right[i]:.0f} of {samples} are right",
                    "answer": "no box" if box is None else box,
                    "reference": rows[k]["answer"],
                    "reward": None,
                    "tokens": tokens,
                    "values": {"surprisal": surprisal},
                }
            )
    return page(name, shown, "surprisal", "generations.jsonl")


def page(name: str, rows: list[dict], colour_by: str, file: str = "samples.jsonl") -> str:
    """One HTML document without a script or a link; `rows` as in samples.jsonl, the latest step first on the page. `file`
    is named where the page leaves something out."""
    bounds = ["below 0.01", *(f"{bound:g}" for bound in LEVELS[:-1]), f"{LEVELS[-1]:g} and more"]
    legend = "".join(f'<span class="t l{i}">{bound}</span>' for i, bound in enumerate(bounds))
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Samples of {escape(name)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>',
        f"<h1>Samples of {escape(name)}</h1>",
        f'<p class="soft">The colour of a token is {COLOURS[colour_by]} at its position, in nats. Point at one for its '
        f'numbers.</p><div class="legend">{legend}</div>',
    ]
    heading = None
    for row in sorted(rows, key=lambda row: -row.get("step", 0)):
        before, heading = heading, row.get("heading") or f"Step {row['step']}"
        parts += [f"<h2>{heading}</h2>"] if heading != before else []
        parts.append(article(row, colour_by, file))
    return "\n".join(parts) + "</html>\n"


def article(row: dict, colour_by: str, file: str) -> str:
    colours = row["values"][colour_by]
    facts = {
        "tokens": f"{row.get('length', len(row['tokens']))}{', cut off' if row['truncated'] else ''}",
        "mean": f"{sum(colours) / len(colours):.4f}" if colours else None,  # a response cut at its first id has no token
        "highest": f"{max(colours):.3f}" if colours else None,
    } | {key: row.get(key) for key in ("reward", "advantage", "verdict", "answer", "reference")}
    shown = "".join(f"<span>{key} <b>{escape(str(value))}</b></span>" for key, value in facts.items() if value is not None)
    tokens = [
        token(text, {key: values[i] for key, values in row["values"].items() if values}, colours[i] if colours else 0)
        for i, text in enumerate(row["tokens"][:PAGE_TOKENS])
    ]
    left = len(row["tokens"]) - PAGE_TOKENS
    more = f'<p class="soft">and {left:,} tokens more, in {file}</p>' if left > 0 else ""
    return (
        f'<article><div class="facts">{shown}</div><div class="problem">{escape(row["problem"])}</div>'
        f'<div class="tokens">{"".join(tokens)}</div>{more}</article>'
    )


def token(text: str, values: dict[str, float], colour: float) -> str:
    level = sum(colour >= bound for bound in LEVELS)
    tip = "\n".join([json.dumps(text, ensure_ascii=False), *(f"{key} {value:.4f}" for key, value in values.items())])
    tip = escape(tip).replace("\n", "&#10;")
    body = escape(text).replace("\n", "<i>↵</i>\n") or "<i>·</i>"
    return f'<span class="t l{level}" data-t="{tip}">{body}</span>'
