"""Shared fixtures: checkpoints small enough to train in a second, and a harness that runs a script's `main` in this
process and keeps what a test wants to check: rollouts, micro-batches, gradients and the weights they were taken at.

A subprocess spends most of its time on imports, so only the tests of the command line itself start one."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from files import tracked
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import eval_math
import fkl_warmup
import grpo
import infra.cli
import opd
import toy
from infra import batches, models, preflight, reward
from infra.sampler_hf import HFSampler

ROOT = Path(__file__).parent.parent


def load_variant(path: Path):
    """The module of a script that is not on the import path."""
    spec = importlib.util.spec_from_file_location(f"variants.{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {"grpo": grpo, "fkl_warmup": fkl_warmup, "opd": opd, "eval_math": eval_math}
SCRIPTS |= {path.removesuffix(".py"): load_variant(ROOT / path) for path in tracked("variants/*.py")}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start
torch.set_num_threads(1)  # the models are too small to gain from more


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def random_model(arch: str = "qwen3", tied: bool = True, hidden: int = 32, seed: int = 0, **config):
    """A model with the toy's vocabulary and weights far enough from 0 that its distributions are not flat."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(toy.ID),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": toy.ID["<|im_end|>"],
        "pad_token_id": toy.ID["<|pad|>"],
    } | config
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if arch == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config = GenerationConfig(eos_token_id=sizes["eos_token_id"], pad_token_id=sizes["pad_token_id"])
    return model.eval()


def load(folder, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def next_token_logits(model, prompt: list[int], response: list[int]):
    """Transformers' own logits behind each response token: one row, no padding, no cache. (R, V)"""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """toy.py's files, with models trained just long enough to end their answers: *.jsonl, teacher_base, student_base."""
    out = tmp_path_factory.mktemp("world")
    sizes = {"train_size": 20, "heldout_size": 8, "dev_size": 4, "test_size": 8, "min_ops": 1, "max_ops": 4}
    pretraining = {
        "batch_size": 32,
        "teacher_hidden": 64,
        "teacher_layers": 1,
        "teacher_steps": 30,
        "student_hidden": 32,
        "student_layers": 1,
        "student_steps": 30,
    }
    args = toy.Args(out=str(out), **sizes, **pretraining)
    dev = toy.write_problems(args)
    with contextlib.redirect_stdout(io.StringIO()):
        for role in ("teacher", "student"):  # toy.main does this in two processes, which take longer to start
            toy.build(role, args, dev)
    torch.set_flush_denormal(False)
    return out


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of random models: `student`, `wide` (hidden size above the vocabulary's), `narrow` (below it), `llama` (head
    not tied)."""
    folders = {}
    for name, model in {
        "student": random_model(seed=1),
        "wide": random_model(seed=2),
        "narrow": random_model(hidden=16, seed=3),
        "llama": random_model("llama", tied=False, seed=4),
    }.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        toy.make_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return SimpleNamespace(**folders)


@pytest.fixture
def data(tmp_path):
    """Twelve problems of different lengths; the answer names its problem, so that a fake grader can tell them apart."""
    texts = [
        "1+2?",
        "3*4-5?",
        "7-1+2*3?",
        "9*9?",
        "2+2+2+2+2?",
        "8-3?",
        "4*4*4?",
        "6+1-9*2?",
        "5?",
        "0+0?",
        "1*7+8?",
        "3-3-3-3?",
    ]
    return write_jsonl(tmp_path / "data.jsonl", [{"problem": text, "answer": f"p{i}"} for i, text in enumerate(texts)])


class FakeGrader:
    """Rewards by `rule(answer, j)` for response j of a problem: a test decides which groups are mixed."""

    rule = staticmethod(lambda answer, j: float(j % 2))
    unparsable = timeouts = 0
    uses_labels = True

    def __init__(self, kind="math"):
        pass

    def grade(self, texts, answers):
        seen, rewards = {}, []
        for _, answer in zip(texts, answers, strict=True):
            rewards.append(self.rule(answer, seen.get(answer, 0)))
            seen[answer] = seen.get(answer, 0) + 1
        return rewards

    def gradable(self, answers):
        return [True] * len(answers)

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake_grader(monkeypatch):
    """`fake_grader(rule)` replaces the grader of every script."""

    def install(rule):
        for module in (reward, *SCRIPTS.values()):
            if hasattr(module, "Grader"):  # the others ask make_grader
                monkeypatch.setattr(module, "Grader", type("Fake", (FakeGrader,), {"rule": staticmethod(rule)}))

    return install


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """`run_script("grpo", **args)`, or a variant by its path, `run_script("variants/opd_weighted", **args)`, runs the
    script's main in a fresh folder and returns what it did:

    out, metrics (rows), record (run.json), samples ([(prompts, n, responses)] per call of the sampler), updates
    ([(params, grads)] before each optimizer step, by name, unclipped), splits (what batches.micro_batches returned),
    passes ([(prompts, responses)] of every forward pass with gradients).

    With `checked=True` teacher and student are checked as in a real run (tests/test_preflight.py has those checks)."""
    count = 0

    def start(script: str, checked=False, **args):
        nonlocal count
        count += 1
        seen = SimpleNamespace(
            out=Path(args.pop("out", tmp_path / f"run{count}")), samples=[], updates=[], splits=[], passes=[]
        )
        trained = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), "--as-typed"])
            load_model, sample, clip = models.load_model, HFSampler.sample, torch.nn.utils.clip_grad_norm_
            micro_batches, response_hidden = batches.micro_batches, batches.response_hidden

            def recording_load_model(*a, **kw):
                model = load_model(*a, **kw)
                if any(p.requires_grad for p in model.parameters()):
                    trained.append(model)
                return model

            def recording_sample(self, prompts, n, *a, **kw):
                responses = sample(self, prompts, n, *a, **kw)
                seen.samples.append((prompts, n, responses))
                return responses

            def recording_clip(*a, **kw):
                named = dict(trained[0].named_parameters())
                seen.updates.append(
                    (
                        {k: p.detach().clone() for k, p in named.items()},
                        {k: p.grad.clone() for k, p in named.items() if p.requires_grad},
                    )
                )
                return clip(*a, **kw)

            def recording_micro_batches(lengths, budget):
                seen.splits.append((list(lengths), micro_batches(lengths, budget)))
                return seen.splits[-1][1]

            def recording_hidden(model, prompts, responses):
                if torch.is_grad_enabled():
                    seen.passes.append((prompts, responses))
                return response_hidden(model, prompts, responses)

            if not checked:
                patch.setattr(preflight, "check_models", lambda *a, **kw: None)
            patch.setattr(models, "load_model", recording_load_model)
            patch.setattr(HFSampler, "sample", recording_sample)
            patch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
            patch.setattr(batches, "micro_batches", recording_micro_batches)
            patch.setattr(batches, "response_hidden", recording_hidden)
            module = SCRIPTS[script]
            module.main(module.Args(out=str(seen.out), **({"instruction": ""} | args)))
        if script != "eval_math":
            seen.metrics = read_jsonl(seen.out / "metrics.jsonl")
            seen.record = json.loads((seen.out / "run.json").read_text())
        return seen

    return start


@pytest.fixture
def cli(monkeypatch, capfd):
    """`cli("grpo", "--model", ...)` is what a user would see of the command: (exit code, stdout, stderr)."""

    def start(script: str, *flags: str):
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)])
        module, code = SCRIPTS[script], 0
        capfd.readouterr()
        try:
            infra.cli.run(module.main, module.Args)
        except SystemExit as stop:
            code = stop.code
        streams = capfd.readouterr()
        return code, streams.out, streams.err

    return start


def saved_activations(model) -> int:
    """Bytes of the distinct tensors, weights left out, that autograd saves in a forward pass of 3 rows of 40 tokens."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros((3, 40), dtype=torch.long), use_cache=False)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def planned_and_used(script: str, *flags: str) -> tuple[float, float]:
    """Peak memory of a command in bytes: as its --plan says, and as the process that ran it had resident."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    plan = subprocess.run([*command, "--plan"], capture_output=True, text=True, timeout=120)
    assert plan.returncode == 0, plan.stderr[-2000:]
    planned = float(re.search(r"^peak ([\d.]+) of", plan.stdout, re.MULTILINE)[1]) * 1e9
    measure = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    measure += "print('rss', code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    command = [sys.executable, "-c", measure, *command]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    code, used = re.search(r"rss (\d+) (\d+)", run.stdout).groups()
    assert code == "0", run.stderr[-2000:]
    return planned, float(used)
