"""Inputs that are damaged or odd in one way each, and how each must end: with the numbers of the sound input, or with one
line and exit code 2 or 3, and where something is left out or doubtful, with a line that says so.

    python tests/stress_inputs.py                 # all, in one process
    python tests/stress_inputs.py --only template: --verbose

SAME           exit code 0 and the results of the sound input, bit for bit; an argument is a line that must be printed
REFUSED        exit code 2, one line on stderr that has every argument
STOPPED        exit code 2 or 3, one line
HANDLED        REFUSED, or exit code 0 with a printed line that has every argument: count and first row, say
RUNS           exit code 0, whatever the numbers
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402
from conftest import ROOT, SCRIPTS, FakeGrader, random_model, write_jsonl  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import infra.cli  # noqa: E402
import toy  # noqa: E402
from infra import reward, run_folder  # noqa: E402

PROBLEMS = ["1+2?", "3*4-5?", "7-1+2*3?", "9*9?", "2+2+2?", "8-3?", "4*4*4?", "0+0?"]
ROWS = [{"problem": text, "answer": str(i)} for i, text in enumerate(PROBLEMS)]
SAMPLING = {"instruction": "", "max_response_tokens": 12, "temperature": 1.0, "top_p": 1.0}
TRAINING = SAMPLING | {"max_steps": 1, "learning_rate": 1e-3, "prompts_per_step": 4, "stop_truncated_frac": 0}
BASE = {
    "eval_math": SAMPLING | {"samples": 2, "top_k": 0},
    "grpo": TRAINING | {"minibatch_prompts": 2, "group_size": 4},
    "opd": TRAINING,
    "fkl_warmup": {k: v for k, v in TRAINING.items() if k != "prompts_per_step"} | {"rollouts_per_step": 4},
}
CASES = []  # (kind, name, function of a Place that returns (script, flags), expectation, its arguments)


def case(kind, name, expected, *patterns):
    return lambda function: CASES.append((kind, name, function, expected, patterns)) or function


class Killed(BaseException):
    """Stands for kill -9."""


class Place:
    """A folder with sound inputs: models `student`, `teacher`, `wide_id` and the problems."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.data = self.write(ROWS)
        self.count = 0

    def model(self, seed: int = 1, name: str = "model", arch="qwen3", **config) -> Path:
        path = self.folder / name
        if not path.exists():
            random_model(arch, seed=seed, **config).save_pretrained(path)
            toy.make_tokenizer().save_pretrained(path)
        return path

    def write(self, rows, name: str = "data.jsonl") -> str:
        return write_jsonl(self.folder / name, rows)

    def flags(self, script: str, **changes) -> list[str]:
        both = {"teacher": self.folder / "teacher", "student": self.folder / "model"}
        models = both if script in ("opd", "fkl_warmup") else {"model": self.folder / "model"}
        data = {"benchmarks": self.data} if script == "eval_math" else {"train_data": self.data}
        named = models | data | {"out": self.folder / "out"} | BASE[script] | changes
        for name, seed in (("model", 1), ("student", 1), ("teacher", 2)):
            if str(named.get(name, "")) in (str(self.folder / "model"), str(self.folder / "teacher")):
                self.model(seed, Path(named[name]).name)
        return [
            part
            for name, value in named.items()
            if value is not None
            for part in words(f"--{name.replace('_', '-')}", value)
        ]


def words(flag: str, value) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, *map(str, value)] if isinstance(value, (list, tuple)) else [f"{flag}={value}"]


def run(script: str, flags: list[str]) -> tuple[int | str, str, str]:
    """(exit code, or the exception's name and message; stdout; stderr) of a script's main, in this process."""
    out, err = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    before, code = sys.argv, 0
    sys.argv = [str(ROOT / f"{script}.py"), *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            infra.cli.run(SCRIPTS[script].main, SCRIPTS[script].Args)
    except SystemExit as stop:
        code = stop.code or 0
    except (Killed, KeyboardInterrupt):
        raise
    except BaseException as error:  # CheckpointException is no Exception
        code = f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:90]}"
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]
    return code, *texts


def outcome(script: str, out: Path):
    """What a run has come to: the graded responses, or the weights."""
    if script == "eval_math":
        [path] = out.glob("*/generations.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [tuple(row[key] for key in ("problem", "answer", "response", "reward", "truncated")) for row in rows]
    weights = load_file(out / "model.safetensors")
    contents = [
        (name.removeprefix("model."), bytes(t.contiguous().view(torch.uint8).numpy())) for name, t in weights.items()
    ]
    return hashlib.sha256(repr(sorted(contents)).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- data
def text_case(name: str, text: str | bytes, expected: str, *patterns, file: str = "data.jsonl", **flags):
    @case("data", name, expected, *patterns)
    def make(place):
        path = place.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        place.data = str(path)
        return "eval_math", place.flags("eval_math", **flags)


def rows_case(name: str, rows, expected: str, *patterns, **flags):
    text_case(name, "".join(json.dumps(row) + "\n" for row in rows), expected, *patterns, **flags)


LINES = [json.dumps(row) for row in ROWS]
TEXT = "\n".join(LINES) + "\n"


def changed(**changes) -> list[dict]:
    """The rows with the third one changed."""
    return [row | changes if i == 2 else row for i, row in enumerate(ROWS)]


def without(*keys) -> list[dict]:
    return [{key: row[key] for key in row if key not in keys} for row in ROWS]


def chats(*extra, **message) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": row["problem"]} | message, *extra], "answer": row["answer"]} for row in ROWS
    ]


text_case("as it should be", TEXT, "SAME")
text_case("byte order mark", b"\xef\xbb\xbf" + TEXT.encode(), "SAME")
text_case("Windows line ends", TEXT.replace("\n", "\r\n"), "SAME")
text_case("blank lines and no last line end", "\n\n" + TEXT.strip() + "\n\n  \n", "SAME")
text_case("no line end at the end", TEXT.strip(), "SAME")
text_case("UTF-16", TEXT.encode("utf-16"), "REFUSED", "--benchmarks")
text_case("latin-1 byte", TEXT.encode().replace(b"9*9?", b"9*9\xf6?"), "REFUSED", "--benchmarks", "line 4")
text_case("empty file", "", "REFUSED", "--benchmarks", "empty")
text_case("white space only", "\n \n", "REFUSED", "--benchmarks", "empty")
text_case("torn last line", TEXT[:-20], "REFUSED", "line 8")
text_case("torn third line", "\n".join([*LINES[:2], LINES[2][:-5], *LINES[3:]]), "REFUSED", "line 3")
text_case("a comma behind each line", TEXT.replace("}\n", "},\n"), "REFUSED", "line 1")
text_case("two objects in a line", LINES[0] + LINES[1] + "\n" + TEXT, "REFUSED", "line 1")
text_case("a line that is a list", TEXT + "[1, 2]\n", "REFUSED", "line 9")
text_case("a line that is null", TEXT + "null\n", "REFUSED", "line 9")
text_case("NUL bytes behind the end", TEXT.encode() + b"\0" * 64, "REFUSED", "line 9")
text_case("a key twice in an object", TEXT + '{"problem": "1?", "problem": "2?", "answer": "3"}\n', "REFUSED", "line 9")
text_case("JSON array", json.dumps(ROWS), "SAME", file="data.json")
text_case(
    "indented JSON array with a byte order mark",
    b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    "SAME",
    file="data.json",
)
text_case("lines in a .json", TEXT, "HANDLED", "--benchmarks", file="data.json")
text_case("empty JSON array", "[]", "REFUSED", "empty", file="data.json")
text_case(
    "JSON object of columns",
    json.dumps({"problem": PROBLEMS, "answer": PROBLEMS}),
    "REFUSED",
    "--benchmarks",
    file="data.json",
)
text_case("a path with brackets", TEXT, "SAME", file="run[1]/data*.jsonl")
text_case("brackets, .json, and the file that they would match", json.dumps(ROWS), "SAME", file="run[1]/data.json")
text_case("blanks and umlauts in the path", TEXT, "SAME", file="zwölf Läufe/däta 1.jsonl")
text_case("another ending", TEXT, "REFUSED", "--benchmarks", file="data.txt")
text_case("capital ending", TEXT, "SAME", file="DATA.JSONL")
rows_case("column question", [{"question": r["problem"], "answer": r["answer"]} for r in ROWS], "SAME")
rows_case("chat prompts", chats(), "SAME")
rows_case(
    "chat content in parts",
    [
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": r["problem"]}]}], "answer": r["answer"]}
        for r in ROWS
    ],
    "SAME",
)
rows_case("chat ends with the assistant", chats({"role": "assistant", "content": "1"}), "REFUSED", "row|line", "assistant")
rows_case("chat with an image", chats(content=[{"type": "image", "url": "x"}]), "REFUSED", "line 1")
rows_case("chat without roles", chats(role=None), "REFUSED", "line 1")
rows_case("empty chat", changed(problem=[]), "REFUSED", "line 3")
rows_case("system column", [row | {"system": "1+1"} for row in ROWS], "RUNS")
rows_case(
    "chat written as text",
    [row | {"problem": str([{"role": "user", "content": "1?"}])} for row in ROWS],
    "REFUSED",
    "line 1",
)
rows_case("duplicates", ROWS + ROWS, "SAME", "8 duplicates", "line 9")
rows_case(
    "duplicates with another answer", [*ROWS, ROWS[0] | {"answer": "7"}], "SAME", "1 duplicate", "another answer", "line 9"
)
rows_case("missing problem in a row", [*ROWS, {"answer": "1"}], "REFUSED", "line 9")
rows_case("null problem", changed(problem=None), "REFUSED", "line 3")
rows_case("blank problem", changed(problem="  "), "REFUSED", "line 3")
rows_case("number as problem", changed(problem=5), "REFUSED", "line 3")
rows_case("no known column", without("problem"), "REFUSED", "problem, question or prompt")
rows_case("no answers", without("answer"), "REFUSED", "answer, solution")
rows_case(
    "one null answer", [*ROWS, {"problem": "5?", "answer": None}], "SAME", r"1 .*without an answer|1 .*left out", "line 9"
)
rows_case(
    "one blank answer", [*ROWS, {"problem": "5?", "answer": " "}], "SAME", r"1 .*without an answer|1 .*left out", "line 9"
)
text_case(
    "one NaN answer", TEXT + '{"problem": "5?", "answer": NaN}\n', "SAME", r"1 .*without an answer|1 .*left out", "line 9"
)
rows_case("all answers null", [row | {"answer": None} for row in ROWS], "REFUSED", "answer")
rows_case("integers as answers", [row | {"answer": int(row["answer"])} for row in ROWS], "SAME")
rows_case("floats as answers", [row | {"answer": float(row["answer"])} for row in ROWS], "SAME", grader="boxed")
rows_case("a list of several answers", changed(answer=["1", "2"]), "HANDLED", "1 ", "line 3")
rows_case("a list of one answer", [row | {"answer": [row["answer"]]} for row in ROWS], "SAME")
rows_case("an object as answer", changed(answer={"value": 2}), "HANDLED", "1 ", "line 3")
rows_case("true as answer", changed(answer=True), "HANDLED", "1 ", "line 3")
rows_case("GSM8K solutions", [row | {"answer": f"So it is.\n#### {row['answer']}"} for row in ROWS], "SAME")
rows_case(
    "solutions with a box", [{"problem": r["problem"], "solution": rf"so \boxed{{{r['answer']}}}."} for r in ROWS], "SAME"
)
rows_case(
    "boxes without braces",
    [{"problem": r["problem"], "solution": rf"so $\boxed {r['answer']}$."} for r in ROWS],
    "SAME",
    "8 answers",
    "line 1",
)
rows_case(
    "a box that may go on", [row | {"answer": rf"\boxed 1{row['answer']}"} for row in ROWS], "HANDLED", r"line 1|answer"
)
rows_case("a box that never closes", changed(answer=r"\boxed{2"), "HANDLED", "1 ", "line 3")
rows_case("an empty box", changed(answer=r"\boxed{}"), "HANDLED", "1 ", "line 3")
rows_case("several boxes", changed(answer=r"\boxed{1} and \boxed{2}"), "SAME", "1 ", "line 3")
rows_case("ground_truth", [{"prompt": r["problem"], "reward_model": {"ground_truth": r["answer"]}} for r in ROWS], "SAME")
rows_case("answer column first in a later row", [*[{"problem": p} for p in ("5?", "6?")], *ROWS], "SAME", "2 ", "line 1")
rows_case("more columns", [row | {"level": 3, "extra": {"a": [1]}} for row in ROWS], "SAME")
rows_case("text that the tokenizer cannot spell", changed(problem="Wie groß?"), "HANDLED", "1 ", "cannot spell|line 3")
rows_case("U+2028 in a text", changed(problem="7-1\u2028+2*3?"), "HANDLED", "1 ", "cannot spell|line 3")
rows_case("an answer of 20,000 characters", changed(answer="1" * 20_000), "RUNS")
rows_case(
    "a sentence as answer", changed(answer="the answer is left to the reader"), "HANDLED", "cannot read 1 of 8", "line 3"
)


@case("data", "1e-05 is e - 5 to nobody", "RUNS")
def scientific(place):
    place.data = place.write(changed(answer=1e-05))
    return "eval_math", place.flags("eval_math")


def table_case(name: str, kind: str, rows, expected: str, *patterns, **flags):
    @case("data", f"{name}, .{kind}", expected, *patterns)
    def make(place):
        path = place.folder / f"table[1].{kind}"
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        place.data = str(path)
        return "eval_math", place.flags("eval_math", **flags)


table_case("as it should be", "parquet", ROWS, "SAME")
table_case(
    "integers beside a null",
    "parquet",
    [row | {"answer": int(row["answer"])} for row in ROWS] + [{"problem": "5?", "answer": None}],
    "SAME",
    "1 ",
    grader="boxed",
)
table_case(
    "integers and a float", "parquet", [row | {"answer": float(row["answer"])} for row in ROWS], "SAME", grader="boxed"
)
table_case("chats", "parquet", chats(), "SAME")
table_case("as it should be", "csv", ROWS, "SAME")
table_case("a null column", "parquet", [row | {"solution": None} for row in ROWS], "SAME")
text_case("no parquet", TEXT, "REFUSED", "--benchmarks", file="data.parquet")
text_case("csv with a short row", "problem,answer\n1+2?,0\n3*4-5?\n", "REFUSED", "line 3", file="data.csv")
text_case("csv with a header only", "problem,answer\n", "REFUSED", "empty", file="data.csv")


@case("data", "a file that is not there", "REFUSED", "--benchmarks", "nowhere.jsonl")
def missing(place):
    return "eval_math", place.flags("eval_math", benchmarks=place.folder / "nowhere.jsonl")


@case("data", "a folder", "REFUSED", "--benchmarks")
def a_folder(place):
    return "eval_math", place.flags("eval_math", benchmarks=place.folder)


@case("data", "two benchmarks of one name", "REFUSED", "--benchmarks", "share")
def one_name(place):
    (place.folder / "b").mkdir()
    return "eval_math", place.flags("eval_math", benchmarks=[place.data, place.write(ROWS, "b/data.jsonl")])


@case("data", "text read in the C locale", "RUNS")
def c_locale(place):
    """In a process of its own: the prompt must be the one that UTF-8 gives."""
    place.data = place.write(changed(problem="Größe 7?"))
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "eval_math.py"), *place.flags("eval_math", out=place.folder / "c")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    rows = outcome("eval_math", place.folder / "c") if not done.returncode else []
    assert done.returncode == 0 and any(row[0] == "Größe 7?" for row in rows), done.stderr[-300:]
    return "eval_math", place.flags("eval_math")


# -------------------------------------------------------------------------------------------------------- checkpoints
def weights_case(name: str, change, expected: str, *patterns, scripts=("eval_math", "grpo", "opd"), **config):
    """`change` gets the state dict and returns another one."""
    for script in scripts:

        @case("checkpoint", f"{name} ({script})", expected, *patterns)
        def make(place, script=script):
            path = place.model(1, "model", **config) / "model.safetensors"
            save_file(change(load_file(path)), path, metadata={"format": "pt"})
            return script, place.flags(script)


def renamed(prefix: str):
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


def replaced(key: str, change):
    return lambda state: state | {key: change(state[key]).contiguous()}


def first(state: dict, key: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name != key}


def poisoned(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
weights_case("keys of torch.compile", renamed("_orig_mod."), "REFUSED", "--model|--student", "missing|lack|not in|no weight")
weights_case("keys of DDP", renamed("module."), "REFUSED", "--model|--student", scripts=("eval_math",))
weights_case("keys of PEFT", renamed("base_model.model."), "REFUSED", "--model|--student", scripts=("grpo",))
weights_case("a tensor missing", lambda s: first(s, UP), "REFUSED", re.escape(UP))
weights_case(
    "a tensor too many",
    lambda s: s | {"model.layers.7.extra": s[NORM].clone()},
    "REFUSED",
    "layers.7.extra",
    scripts=("eval_math", "grpo"),
)
weights_case("a wrong shape", replaced(UP, lambda t: t[:-1]), "REFUSED", "up_proj|shape|size", scripts=("eval_math", "grpo"))
weights_case("a nan", replaced(UP, poisoned(float("nan"))), "REFUSED", "nan|finite")
weights_case("an inf", replaced(UP, poisoned(float("inf"))), "REFUSED", "inf|finite", scripts=("eval_math",))


@case("checkpoint", "keys of torch.compile in the teacher", "REFUSED", "--teacher")
def renamed_teacher(place):
    path = place.model(2, "teacher") / "model.safetensors"
    save_file(renamed("_orig_mod.")(load_file(path)), path, metadata={"format": "pt"})
    return "opd", place.flags("opd")


@case("checkpoint", "tied in the config, a head of its own in the file", "RUNS")
def own_head(place):
    """Either the head of the file counts, as loaded, or it is refused; the numbers must be those of the untied model."""
    path = place.model()
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = 1.5 * state["model.embed_tokens.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    untied = shutil.copytree(path, place.folder / "untied")
    edit_json(untied / "config.json", tie_word_embeddings=False)
    results = []
    for model in (path, untied):
        code, _, err = run("eval_math", place.flags("eval_math", model=model, out=place.folder / f"out_{model.name}"))
        assert code == 0, err
        results.append(outcome("eval_math", place.folder / f"out_{model.name}"))
    assert results[0] == results[1], "the head of the file does not count"
    return "eval_math", place.flags("eval_math", overwrite=True)


def edit_json(path: Path, **changes) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (record | changes).items() if value is not ...}))


def folder_case(name: str, change, expected: str, *patterns, script="eval_math", **flags):
    """`change` gets the model's folder."""

    @case("checkpoint", f"{name} ({script})", expected, *patterns)
    def make(place):
        change(place.model())
        return script, place.flags(script, **flags)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


folder_case("truncated weights", lambda f: cut(f / "model.safetensors", 0.7), "REFUSED", "--model")
folder_case("empty weights", lambda f: cut(f / "model.safetensors", 0), "REFUSED", "--model")
folder_case("no weights", lambda f: (f / "model.safetensors").unlink(), "REFUSED", "--model")
folder_case("no config", lambda f: (f / "config.json").unlink(), "REFUSED", "--model")
folder_case("torn config", lambda f: cut(f / "config.json", 0.5), "REFUSED", "--model")
folder_case("no tokenizer", lambda f: [p.unlink() for p in f.glob("*token*")], "REFUSED", "--model")
folder_case("torn tokenizer", lambda f: cut(f / "tokenizer.json", 0.5), "REFUSED", "--model")
folder_case(
    "unknown architecture",
    lambda f: edit_json(f / "config.json", model_type="foo", architectures=["Foo"]),
    "REFUSED",
    "--model",
)
folder_case(
    "an encoder",
    lambda f: edit_json(f / "config.json", model_type="bert", architectures=["BertModel"]),
    "REFUSED",
    "--model",
)
folder_case(
    "code of its own",
    lambda f: edit_json(
        f / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    ),
    "REFUSED",
    "--model",
)
folder_case(
    "pickled weights only",
    lambda f: (torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin"), (f / "model.safetensors").unlink()),
    "REFUSED",
    "--model",
)
folder_case(
    "sampling settings beside greedy",
    lambda f: edit_json(f / "generation_config.json", temperature=0.6, top_p=0.95),
    "SAME",
    script="grpo",
)
folder_case(
    "sampling settings beside greedy", lambda f: edit_json(f / "generation_config.json", temperature=0.6, top_p=0.95), "SAME"
)
folder_case("no generation config", lambda f: (f / "generation_config.json").unlink(), "SAME")
folder_case(
    "a list of EOS ids", lambda f: edit_json(f / "generation_config.json", eos_token_id=[toy.ID["<|im_end|>"]]), "SAME"
)
folder_case("dropout in the config", lambda f: edit_json(f / "config.json", attention_dropout=0.5), "SAME", script="grpo")
folder_case(
    "dropout with checkpointing",
    lambda f: edit_json(f / "config.json", attention_dropout=0.5),
    "SAME",
    script="grpo",
    gradient_checkpointing=True,
)
folder_case(
    "fewer layers in the config",
    lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=...),
    "REFUSED",
    "layers.1",
)
folder_case(
    "more layers in the config",
    lambda f: edit_json(f / "config.json", num_hidden_layers=3, layer_types=...),
    "REFUSED",
    "layers.2",
)


@case("checkpoint", "a shard missing", "REFUSED", "--model")
def shard_missing(place):
    path = place.model()
    random_model(seed=1).save_pretrained(path, max_shard_size="10KB")
    (path / "model.safetensors").unlink(missing_ok=True)
    sorted(path.glob("model-*.safetensors"))[-1].unlink()
    return "eval_math", place.flags("eval_math")


@case("checkpoint", "shards", "SAME")
def shards(place):
    path = place.model()
    (path / "model.safetensors").unlink()
    random_model(seed=1).save_pretrained(path, max_shard_size="10KB")
    return "eval_math", place.flags("eval_math")


for _script in ("eval_math", "grpo"):

    @case("checkpoint", f"a folder that is not there ({_script})", "REFUSED", "--model")
    def not_there(place, script=_script):
        return script, place.flags(script, model=place.folder / "nowhere")


@case("checkpoint", "a file", "REFUSED", "--model")
def a_file(place):
    return "eval_math", place.flags("eval_math", model=place.model() / "model.safetensors")


@case("checkpoint", "teacher and student with other vocabularies", "REFUSED", "vocabular|tokenizer|id")
def other_tokenizer(place):
    path = place.model(2, "teacher") / "tokenizer.json"
    path.write_text(path.read_text().replace('"+"', '"~"').replace('"-"', '"+"').replace('"~"', '"-"'))
    return "opd", place.flags("opd")


# ---------------------------------------------------------------------------------------------- templates, tokenizers
def template_case(name: str, template: str, expected: str, *patterns, rows=ROWS, script="eval_math"):
    @case("template", f"{name} ({script})", expected, *patterns)
    def make(place):
        place.data = place.write(rows)
        path = place.model()
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = json.loads((path / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return script, place.flags(script)


OWN = toy.CHAT_TEMPLATE
PARTS = OWN.replace("+ m['content'] }}", "}}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}")
FUSSY = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
    + OWN
)
DATED = "{% set today = strftime_now('%d') %}" + OWN.replace("'<|' + m['role']", "today[0] + '<|' + m['role']")
template_case("as it should be", OWN, "SAME")
template_case("content in parts", PARTS, "SAME")
template_case("content in parts", PARTS, "SAME", script="grpo")
template_case("drops the content", OWN.replace("+ m['content'] }}", "}}"), "REFUSED", "--model", "template")
template_case("drops the content", OWN.replace("+ m['content'] }}", "}}"), "REFUSED", "--model", "template", script="grpo")
template_case("first ten characters", OWN.replace("m['content']", "m['content'][:3]"), "REFUSED", "template")
template_case(
    "refuses the system role", FUSSY, "REFUSED", "template", "system", rows=[row | {"system": "1"} for row in ROWS]
)
template_case("refuses the system role, none given", FUSSY, "SAME")
template_case(
    "drops the system message",
    OWN.replace("in messages %}", "in messages if m['role'] != 'system' %}"),
    "REFUSED",
    "template",
    "system",
    rows=[row | {"system": "1+1"} for row in ROWS],
)
template_case("the date in it", DATED, "HANDLED", "date", "template")
template_case("syntax error", OWN + "{% if %}", "REFUSED", "template")
template_case("an unknown filter", OWN.replace("m['content']", "m['content'] | nonsense"), "REFUSED", "template")
template_case(
    "a word that the tokenizer cannot spell", OWN.replace("m['content']", "'a' + m['content']"), "HANDLED", "spell"
)
template_case("empty", "", "REFUSED", "template")


@case("template", "none", "REFUSED", "--model", "template")
def no_template(place):
    for file in place.model().glob("chat_template*"):
        file.unlink()
    edit_json(place.model() / "tokenizer_config.json", chat_template=...)
    return "eval_math", place.flags("eval_math")


def tokenizer_case(name: str, change, expected: str, *patterns, script="eval_math"):
    @case("tokenizer", f"{name} ({script})", expected, *patterns)
    def make(place):
        change(place.model())
        return script, place.flags(script)


tokenizer_case("no EOS", lambda f: edit_json(f / "tokenizer_config.json", eos_token=...), "REFUSED", "--model", "eos")
tokenizer_case("no padding token", lambda f: edit_json(f / "tokenizer_config.json", pad_token=...), "SAME")


def move_ids(folder: Path) -> None:
    """The special ids 6 further up, with their rows of the embedding: a hole in front of them."""
    record, names = json.loads((folder / "tokenizer.json").read_text()), set(toy.SPECIAL)
    for token in record["added_tokens"]:
        token["id"] += 6
    vocab = record["model"]["vocab"]
    record["model"]["vocab"] = {name: i + 6 if name in names else i for name, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(record))
    state = load_file(folder / "model.safetensors")
    table, start = state["model.embed_tokens.weight"], min(toy.ID[name] for name in names)
    hole = torch.zeros(6, table.shape[1]) - 0.0
    state["model.embed_tokens.weight"] = torch.cat([table[:start], hole, table[start:]]).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    eos, pad = toy.ID["<|im_end|>"] + 6, toy.ID["<|pad|>"] + 6
    edit_json(folder / "config.json", vocab_size=len(table) + 6, eos_token_id=eos, pad_token_id=pad)
    edit_json(folder / "generation_config.json", eos_token_id=eos, pad_token_id=pad)


def grow_vocabulary(folder: Path) -> None:
    """A token that the model has no row for."""
    record = json.loads((folder / "tokenizer.json").read_text())
    record["model"]["vocab"]["@"] = len(toy.ID)
    (folder / "tokenizer.json").write_text(json.dumps(record))


tokenizer_case("larger than the model, but no problem needs it", grow_vocabulary, "SAME")


@case("tokenizer", "larger than the model, and a problem needs it", "REFUSED", "--model")
def beyond_the_model(place):
    grow_vocabulary(place.model())
    place.data = place.write(changed(problem="7@1?"))
    return "eval_math", place.flags("eval_math")


@case("tokenizer", "a hole in the ids: an EOS ends a response", "RUNS")
def hole(place):
    move_ids(place.model())
    code, _, err = run("eval_math", place.flags("eval_math", out=place.folder / "hole", max_response_tokens=64))
    assert code == 0, err
    [path] = (place.folder / "hole").glob("*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["truncated_frac"] < 0.9 and summary["out_of_vocab"] < 8, summary
    return "eval_math", place.flags("eval_math")


# ------------------------------------------------------------------------------------------------------- record files
def killed(place, script: str, **flags) -> list[str]:
    """Run until before the final save, then stop as a kill would: checkpoints of every step are there."""
    flags = place.flags(script, max_steps=4, save_every=1, keep_last=2, **flags)
    finish = run_folder.Run.finish

    def end(self, *a, **kw):
        if not parallel_rank():
            self.lock.close()
        raise Killed

    run_folder.Run.finish = end
    try:
        run(script, flags)
    except Killed:
        pass
    finally:
        run_folder.Run.finish = finish
    return flags


def parallel_rank() -> int:
    from infra import parallel

    return parallel.rank()


def record_case(name: str, change, expected: str, *patterns, script="grpo", more=()):
    """`change` gets the run folder of a killed run; then the same command goes on, with the flags `more`."""

    @case("record", f"{name} ({script})", expected, *patterns)
    def make(place):
        flags = killed(place, script)
        change(place.folder / "out", place)
        return script, [*flags, "--resume", *more]


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step_*[0-9]"))[-1]


def torn(name: str):
    return lambda out, place: cut(out / name, 0.5)


record_case("as it should be", lambda out, place: None, "SAME")
record_case("empty run.json", lambda out, place: (out / "run.json").write_text(""), "SAME")
record_case("torn run.json", torn("run.json"), "SAME")
record_case("no run.json", lambda out, place: (out / "run.json").unlink(), "SAME")
record_case("run.json of another program", lambda out, place: (out / "run.json").write_text("[1]"), "HANDLED", "run.json")
record_case("torn metrics", lambda out, place: (out / "metrics.jsonl").open("a").write('{"step": 4, "cha'), "SAME")
record_case("metrics with zero bytes", lambda out, place: (out / "metrics.jsonl").open("ab").write(b"\0" * 40), "SAME")
record_case("no metrics", lambda out, place: (out / "metrics.jsonl").unlink(), "SAME")
record_case("torn samples", torn("samples.jsonl"), "SAME")
record_case(
    "a checkpoint that was being written",
    lambda out, place: shutil.copytree(newest(out), out / "checkpoints/step_000009.partial"),
    "SAME",
)
record_case(
    "newest checkpoint cut",
    lambda out, place: [cut(p, 0.5) for p in newest(out).glob("*.distcp")],
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case(
    "newest checkpoint without .distcp",
    lambda out, place: [p.unlink() for p in newest(out).glob("*.distcp")],
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case(
    "newest checkpoint without state.json",
    lambda out, place: (newest(out) / "state.json").unlink(),
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case(
    "newest checkpoint's state.json torn",
    lambda out, place: cut(newest(out) / "state.json", 0.5),
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case(
    "newest checkpoint without .metadata",
    lambda out, place: (newest(out) / ".metadata").unlink(),
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case(
    "newest checkpoint an empty folder",
    lambda out, place: [p.unlink() for p in newest(out).iterdir()],
    "HANDLED",
    "step_000003",
    "step_000002",
)
record_case("another seed", lambda out, place: None, "REFUSED", "--seed", more=("--seed=2",))
record_case("other data in the same file", lambda out, place: place.write(changed(answer="5")), "REFUSED", "--train-data")
record_case(
    "other data in the same file", lambda out, place: place.write(ROWS[:-1]), "REFUSED", "--train-data", script="opd"
)
record_case(
    "another model in the same folder",
    lambda out, place: (shutil.rmtree(place.folder / "model"), place.model(5)),
    "REFUSED",
    "--model",
)
record_case("without --resume", lambda out, place: None, "REFUSED", "--out", "--resume", more=("--no-resume",))
record_case("as it should be", lambda out, place: None, "SAME", script="opd")
record_case("as it should be", lambda out, place: None, "SAME", script="fkl_warmup")
record_case(
    "torn rollouts",
    lambda out, place: [cut(p, 0.98) for p in out.glob("rollouts*.jsonl")],
    "HANDLED",
    "rollouts",
    script="fkl_warmup",
)
record_case(
    "other --rollouts-per-prompt",
    lambda out, place: None,
    "REFUSED",
    "--rollouts-per-prompt",
    script="fkl_warmup",
    more=("--rollouts-per-prompt=2",),
)


@case("record", "a flag of --resume counts: learning rate", "RUNS")
def resumed_flag(place):
    flags = killed(place, "grpo")
    shutil.copytree(place.folder / "out", place.folder / "slow")
    code, _, err = run("grpo", [*flags, "--resume", "--learning-rate=1e-9", f"--out={place.folder}/slow"])
    run("grpo", [*flags, "--resume"])
    assert code == 2 or outcome("grpo", place.folder / "slow") != outcome("grpo", place.folder / "out"), (
        "the flag is ignored"
    )
    return "grpo", place.flags("grpo", out=place.folder / "third")


@case("record", "finished, more steps asked for", "REFUSED", "--max-steps|finished")
def finished_longer(place):
    run("grpo", place.flags("grpo"))
    return "grpo", place.flags("grpo", max_steps=3, resume=True)


@case("record", "finished, the same line", "SAME")
def finished_again(place):
    run("grpo", place.flags("grpo"))
    return "grpo", place.flags("grpo", resume=True)


def evaluation_case(name: str, change, expected: str, *patterns, **more):
    """`change` gets the folder of the finished benchmark."""

    @case("record", f"evaluation: {name}", expected, *patterns)
    def make(place):
        run("eval_math", place.flags("eval_math"))
        change(place.folder / "out/data", place)
        return "eval_math", place.flags("eval_math", **more)


evaluation_case("the same line", lambda out, place: None, "SAME", "finished before")
evaluation_case("torn summary", torn("summary.json"), "REFUSED", "summary.json", "--overwrite")
evaluation_case("torn summary, --overwrite", torn("summary.json"), "SAME", overwrite=True)
evaluation_case("another model", lambda out, place: place.model(3, "other"), "REFUSED", "--model", model=None)
evaluation_case("another limit", lambda out, place: None, "REFUSED", "--limit", limit=3)
evaluation_case("other problems in the file", lambda out, place: place.write(changed(answer="7")), "REFUSED", "--benchmarks")
evaluation_case(
    "another model in the folder",
    lambda out, place: (shutil.rmtree(place.folder / "model"), place.model(3)),
    "REFUSED",
    "--model",
)
evaluation_case(
    "folder of results copied, a torn partial line",
    lambda out, place: [
        (out / "partial_0.jsonl").write_text('{"1+2?": [['),
        (out / "summary.json").unlink(),
        (out / "generations.jsonl").unlink(),
    ],
    "SAME",
    "1 torn lines cut",
)


# -------------------------------------------------------------------------------------------------------------- flags
def flag_case(script: str, expected: str, *patterns, **flags):
    shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())

    @case("flag", f"{script} {shown}", expected, *patterns)
    def make(place):
        return script, place.flags(script, **flags)


for _script, _name, _values in [
    ("eval_math", "samples", (0, -1)), ("eval_math", "limit", (0, -3)), ("eval_math", "max_response_tokens", (0,)),
    ("eval_math", "temperature", (-1, "nan", "inf")), ("eval_math", "top_p", (0, 1.5, "nan")), ("eval_math", "top_k", (-1,)),
    ("grpo", "group_size", (1, 0)), ("grpo", "prompts_per_step", (0, -4, 3)), ("grpo", "minibatch_prompts", (0, 3)),
    ("grpo", "learning_rate", (-1, "nan", "inf")), ("grpo", "max_steps", (0, -1)), ("grpo", "temperature", (0, -1, "nan")),
    ("grpo", "top_p", (0.5,)), ("grpo", "max_prompt_tokens", (0, 1)), ("grpo", "eval_every", (1,)),
    ("grpo", "keep_last", (0,)), ("grpo", "epochs", (0,)), ("grpo", "micro_batch_tokens", (0,)),
    ("grpo", "stop_truncated_frac", (2,)), ("opd", "prompts_per_step", (0,)), ("opd", "learning_rate", (-1,)),
    ("opd", "jsd_beta", (1.5, "nan")), ("fkl_warmup", "rollouts_per_prompt", (0,)),
    ("fkl_warmup", "rollouts_per_step", (0,)), ("grpo", "max_flops", (-1,)), ("grpo", "kl_coef", (-1,)),
    ("grpo", "learning_rate_warmup_steps", (-1,)),
]:  # fmt: skip
    for _value in _values:
        flag_case(_script, "REFUSED", "--" + _name.replace("_", "-"), **{_name: _value})
flag_case("eval_math", "REFUSED", "--vllm-tp|--sampler|vllm", sampler="vllm", vllm_tp=3, dtype="float64")
flag_case("eval_math", "REFUSED", "--out", out="/dev/null/results")
flag_case("grpo", "REFUSED", "--out", out="/dev/null/run")
flag_case("eval_math", "REFUSED", "--model", model=None)
flag_case("grpo", "REFUSED", "--label-split", label_split="nowhere.jsonl")
flag_case("grpo", "REFUSED", "--answer-column", answer_column="label")
flag_case("grpo", "REFUSED", "--prompt-column", prompt_column="text")
flag_case("eval_math", "REFUSED", "--compare", compare=("nowhere", "nowhere"))
flag_case("eval_math", "REFUSED", "--regrade", regrade="nowhere")


# ----------------------------------------------------------------------------------------------------------- the end
def judge(expected: str, patterns, sound, script: str, place, code, out: str, err: str) -> str:
    """ "" if the case ended as it must, else what was wrong."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    refused = code in (2, 3) and len(errors) == 1 and "Traceback" not in err
    said = [p for p in patterns if not re.search(p, errors[0] if refused else out, re.IGNORECASE)]
    if expected == "REFUSED" or (expected == "HANDLED" and code != 0):
        if not refused or code != 2:
            return f"exit {code}" + (f", {len(errors)} error lines" if code in (2, 3) else "")
    elif code != 0:
        return f"exit {code}: {(errors or [''])[0][:160]}"
    if said:
        return f"exit {code}, not said: {' and '.join(said)}" + (f" in {errors[0][:160]!r}" if refused else "")
    if expected == "SAME":
        steps = 4 if "--max-steps=4" in place.typed else 1
        columns = slice(0 if place.same_problems else 1, None)
        now, before = outcome(script, place.folder / "out"), sound(script, steps)
        if script == "eval_math":
            now, before = [row[columns] for row in now], [row[columns] for row in before]
        return "" if now == before else "other numbers"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose kind or name has this")
    parser.add_argument("--verbose", action="store_true", help="show what failing cases printed")
    parser.add_argument("--all", action="store_true", help="list the cases that ended as they must, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reward.Grader = FakeGrader  # of grpo.py: every second response is right, or nothing would train
    logging.disable(logging.WARNING)
    start, totals, cache = time.time(), {}, {}
    with tempfile.TemporaryDirectory() as folder:

        def sound(script: str, steps: int):
            """Of the sound inputs."""
            if (script, steps) not in cache:
                place = Place(Path(folder) / f"sound_{script}_{steps}")
                more = {} if script == "eval_math" else {"max_steps": steps}
                code, _, err = run(script, place.flags(script, **more))
                assert code == 0, err
                cache[script, steps] = outcome(script, place.folder / "out")
            return cache[script, steps]

        for number, (kind, name, make, expected, patterns) in enumerate(CASES):
            if args.only not in f"{kind}: {name}":
                continue
            place, out, err = Place(Path(folder) / str(number)), "", ""
            place.same_problems = True
            try:
                script, place.typed = make(place)
                code, out, err = run(script, place.typed)
                wrong = judge(expected, patterns, sound, script, place, code, out, err)
            except (Exception, Killed) as error:
                wrong, err = f"{type(error).__name__}: {str(error)[:160]}", traceback.format_exc()
            right, all_ = totals.get(kind, (0, 0))
            totals[kind] = (right + (not wrong), all_ + 1)
            if wrong or args.all:
                print(f"{'WRONG' if wrong else 'right':6}{kind:11}{name:62.62} {expected:8} {wrong}", flush=True)
            if wrong and args.verbose:
                print(out[-1500:], err[-2500:], sep="\n")
            shutil.rmtree(place.folder, ignore_errors=True)
    for kind, (right, all_) in totals.items():
        print(f"{kind:11}{right:4} of {all_} as they must be")
    right, all_ = [sum(column) for column in zip(*totals.values(), strict=True)]
    print(f"{'together':11}{right:4} of {all_}, {time.time() - start:.0f} s")
    sys.exit(right != all_)


if __name__ == "__main__":
    main()
