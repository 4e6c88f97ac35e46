"""Early signs against their definitions, stop rules, and the samples with their page."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from conftest import load, next_token_logits, read_jsonl, write_jsonl

import toy
from infra import run_folder, samples_page, telemetry
from infra.cli import RunStopped
from infra.dataset import Problem
from infra.sampler import Response
from infra.samples_page import Samples, page, token_texts
from kernels import TeacherHead, TeacherLogits

SIZES = {"grpo": {"prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 4}, "opd": {"prompts_per_step": 6},
         "fkl_warmup": {"rollouts_per_step": 6}}  # fmt: skip


@pytest.fixture
def train(run_script, checkpoints, data, fake_grader):
    """`train(script, **args)`: two steps on random models, half of each group right."""
    fake_grader(lambda answer, j: float(j % 2))

    def start(script, **args):
        models = {"teacher": checkpoints.narrow, "student": checkpoints.student}
        models = {"model": checkpoints.student} if script == "grpo" else models
        fixed = {"train_data": data, "max_response_tokens": 12, "max_steps": 2}
        return run_script(script, **(models | SIZES[script] | fixed | args))

    return start


# ---------------------------------------------------------------------------------------------------------- early signs
def test_repetition_is_the_share_of_4_grams_seen_before():
    assert telemetry.repetition([[1, 2, 3, 4, 5, 6, 7, 8]]) == 0
    assert telemetry.repetition([[1] * 13]) == pytest.approx(9 / 10)  # ten 4-grams, all the same
    assert telemetry.repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # 1234 comes twice among five
    assert telemetry.repetition([[1, 2, 3], [1]]) == 0, "too short to repeat anything"
    assert telemetry.repetition([[1] * 13, [1, 2, 3]]) == pytest.approx(9 / 20), "a mean over responses"


def test_thirds_cover_every_token_once():
    lengths = [1, 2, 3, 7, 30]
    values = torch.arange(43, dtype=torch.float32)
    sums, counts = telemetry.sums_by_third(values, lengths)
    assert sums.sum() == values.sum() and sum(counts) == 43
    expected, tokens, start = torch.zeros(3, dtype=torch.float64), [0, 0, 0], 0
    for n in lengths:
        for t in range(n):
            expected[t * 3 // n] += values[start + t]
            tokens[t * 3 // n] += 1
        start += n
    assert torch.equal(sums, expected) and counts == tokens
    assert telemetry.sums_by_third(torch.ones(30), [30])[1] == [10, 10, 10]


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_k_sums_equal_the_definition(form, temperature):
    torch.manual_seed(0)
    N, H, V, K = 200, 6, 40, telemetry.TOP_K
    hidden, head, other, other_head = (torch.randn(*s) for s in ((N, H), (V, H), (N, H), (V - 3, H)))
    target = TeacherHead(other, other_head) if form == "hidden" else TeacherLogits(other @ other_head.T)
    *sums, count = telemetry.top_k_sums(hidden, head, target, temperature, tokens=N)
    expected = torch.zeros(3, dtype=torch.float64)
    for n in range(0, N, 16):
        ps = torch.softmax((hidden[n] @ head.T)[: V - 3] / temperature, -1)
        pt = torch.softmax(other[n] @ other_head.T / temperature, -1)
        shared = sorted(set(ps.topk(K).indices.tolist()) & set(pt.topk(K).indices.tolist()))
        expected += torch.tensor([len(shared) / K, float(ps[shared].sum()), float(pt[shared].sum())])
    assert count == 13 and torch.allclose(torch.stack(sums).double(), expected, atol=1e-5)


def test_top_k_of_a_model_with_itself_is_all_of_it():
    hidden, head = torch.randn(64, 4), torch.randn(100, 4)
    overlap, student, teacher, count = telemetry.top_k_sums(hidden, head, TeacherHead(hidden, head), 1.0, 64)
    assert overlap == count == 4 and student == teacher < count


def test_no_rows_add_nothing(tmp_path):
    """A rank may have no rows of its own."""
    nothing, head = torch.zeros(0, 4), torch.randn(10, 4)
    sums, counts = telemetry.sums_by_third(torch.zeros(0), [])
    assert sums.tolist() == [0.0] * 3 and counts == [0, 0, 0]
    assert telemetry.top_k_sums(nothing, head, TeacherHead(nothing, head), 1.0, 100) == (0, 0, 0, 0)
    samples = Samples(tmp_path, toy.make_tokenizer(), 1, "reverse_kl")
    samples.keep(1, [], [], reverse_kl=torch.zeros(0))
    assert samples.kept == {}


def test_a_large_step_samples_few_positions():
    hidden, head = torch.randn(10_000, 2), torch.randn(10, 2)
    count = telemetry.top_k_sums(hidden, head, TeacherHead(hidden, head), 1.0, tokens=100_000)[3]
    assert count == math.ceil(10_000 / (100_000 // telemetry.OVERLAP_TOKENS))


@pytest.mark.parametrize("script, kl", [("opd", "reverse_kl"), ("fkl_warmup", "forward_kl")])
def test_kl_by_position_adds_up_to_the_mean(train, script, kl):
    """However the step is cut into micro-batches."""
    rows = [train(script, dtype="float64", micro_batch_tokens=budget).metrics[0] for budget in (40, 10_000)]
    for name in ("early", "middle", "late"):
        assert rows[0][f"losses/{kl}_{name}"] == pytest.approx(rows[1][f"losses/{kl}_{name}"], rel=1e-9)
    parts = [rows[0][f"losses/{kl}_{name}"] for name in ("early", "middle", "late")]
    assert min(parts) < rows[0][f"losses/{kl}"] < max(parts) and len(set(parts)) == 3


def test_opd_logs_each_third_of_its_own_responses(train, checkpoints):
    run = train("opd", dtype="float64", max_steps=1)
    [(prompts, _, responses)] = run.samples
    student, teacher, thirds = load(checkpoints.student), load(checkpoints.narrow), [[], [], []]
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            ps, pt = (torch.log_softmax(next_token_logits(m, prompt, response.ids), -1) for m in (student, teacher))
            for t, kl in enumerate((ps.exp() * (ps - pt)).sum(-1).tolist()):
                thirds[t * 3 // len(response.ids)].append(kl)
    for name, kls in zip(("early", "middle", "late"), thirds, strict=True):
        assert run.metrics[0][f"losses/reverse_kl_{name}"] == pytest.approx(sum(kls) / len(kls), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- stop rules
@pytest.mark.parametrize("script", ["grpo", "opd", "fkl_warmup"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_nan_stops_the_run_before_it_reaches_the_weights(train, checkpoints, tmp_path, monkeypatch, script, where):
    """At the second update: the checkpoint holds the first one's result, finite and moved."""
    clip, updates = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *a, **kw):
        parameters = list(parameters)
        updates.append(1)
        if len(updates) == 2 and where == "gradient":
            parameters[0].grad[0, 0] = float("inf")
        return clip(parameters, *a, **kw)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    if where == "loss":
        unless_finite = run_folder.StopRules.unless_finite

        def nan_loss(self, step, policy_loss, **values):
            unless_finite(self, step, policy_loss=policy_loss * (float("nan") if len(updates) == 2 else 1), **values)

        monkeypatch.setattr(run_folder.StopRules, "unless_finite", nan_loss)
    with pytest.raises(RunStopped) as stop:
        train(script, out=str(tmp_path / "run"), learning_rate=1e-3, max_steps=5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    name = {"gradient": "grad_norm inf", "loss": "policy_loss nan"}[where]
    assert record["finished"] is False and name in record["stopped"] and "not applied" in record["stopped"]
    assert len(updates) == 2 and name in str(stop.value)
    saved, start = load(tmp_path / "run").state_dict(), load(checkpoints.student).state_dict()
    assert all(w.isfinite().all() for w in saved.values())
    assert any(not torch.equal(saved[name], start[name]) for name in saved), "the first update was applied"


def test_truncated_responses_stop_the_run_after_the_patience(train, tmp_path, monkeypatch):
    args = dict(max_response_tokens=1, stop_truncated_frac=0.5, stop_patience=3)  # one token is seldom an EOS
    with pytest.raises(RunStopped):
        train("opd", out=str(tmp_path / "run"), max_steps=20, **args)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    stopped = json.loads((tmp_path / "run" / "run.json").read_text())["stopped"]
    assert all(row["charts/truncated_frac"] > 0.5 for row in rows[-3:]) and f"step {len(rows)}: " in stopped
    assert "--stop-truncated-frac 0" in stopped and len(rows) < 20
    assert load(tmp_path / "run")
    # a bound of 0 turns the rule off
    assert train("opd", max_steps=6, **(args | {"stop_truncated_frac": 0.0})).record["finished"]


def test_a_resumed_run_has_used_up_some_of_its_patience(train, tmp_path):
    out, args = tmp_path / "run", dict(max_response_tokens=1, stop_truncated_frac=0.5, save_every=1, max_steps=20)
    with pytest.raises(RunStopped):
        train("opd", out=str(out), stop_patience=3, **args)
    first = len(read_jsonl(out / "metrics.jsonl"))  # the checkpoint is of the step before
    with pytest.raises(RunStopped):
        train("opd", out=str(out), stop_patience=4, resume=True, **args)
    assert len(read_jsonl(out / "metrics.jsonl")) == first + 1


def test_the_patience_starts_again_after_a_good_step(capsys):
    stops = []
    rules = object.__new__(run_folder.StopRules)
    rules.args = type("Args", (), {"stop_truncated_frac": 0.5, "stop_patience": 2, "max_response_tokens": 8})
    rules.steps_truncated, rules.stop = 0, stops.append
    for step, frac in enumerate((0.6, 0.5, 0.6, 0.4, 0.6), 1):
        rules.if_truncated(step, frac)
    assert stops == [], "exactly at the bound is not above it"
    warning = "warning: 60% of the first step's responses do not end within --max-response-tokens 8: raise it\n"
    assert capsys.readouterr().out == warning, "once, and only at the first step"
    rules.if_truncated(6, 0.6)
    assert len(stops) == 1 and stops[0].startswith("step 6: ")


# -------------------------------------------------------------------------------------------------------------- samples
@pytest.mark.parametrize("script, colour", [("opd", "reverse_kl"), ("fkl_warmup", "forward_kl"), ("grpo", "surprisal")])
def test_samples_hold_what_was_sampled(train, script, colour):
    run = train(script, sample_every=2, max_steps=5)
    rows = read_jsonl(run.out / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [4] * 4
    tokenizer = toy.make_tokenizer()
    sampled = [r for _, _, responses in run.samples for r in responses]
    for row in rows:
        same = [r for r in sampled if tokenizer.decode(r.ids) == row["response"]]  # two prompts may get one short answer
        response = same[0]
        assert "".join(row["tokens"]) == row["response"] and len(row["tokens"]) == len(response.ids)
        assert row["truncated"] == response.truncated and row["reward"] in (0.0, 1.0)
        assert all(len(values) == len(response.ids) for values in row["values"].values())
        logprobs = {"opd": row["values"].get("student_logprob"), "grpo": [-v for v in row["values"].get("surprisal", [])]}
        if script in logprobs:
            assert any(logprobs[script] == pytest.approx(r.sampler_logprobs, abs=2e-4) for r in same)
        assert (row["advantage"] is not None) == (script == "grpo")
    if script == "grpo":
        assert {row["reward"] for row in rows} == {0.0, 1.0} and all(
            (r["advantage"] > 0) == (r["reward"] == 1) for r in rows
        )
    assert colour in rows[0]["values"] and (run.out / "samples.html").exists()


def test_samples_can_be_turned_off_and_change_no_training(train):
    on, off = train("opd", sample_every=1), train("opd", sample_every=0)
    assert not (off.out / "samples.jsonl").exists() and not (off.out / "samples.html").exists()
    for a, b in zip(on.updates, off.updates, strict=True):
        assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_a_problem_without_an_answer_has_no_reward(train, tmp_path):
    unlabeled = write_jsonl(tmp_path / "u.jsonl", [{"problem": f"{i}+1?"} for i in range(8)])
    run = train("opd", train_data=unlabeled)
    assert {row["reward"] for row in read_jsonl(run.out / "samples.jsonl")} == {None}


def write_some(samples, step, texts=("a",)):
    ids = [[k] for k in range(len(texts))]
    samples.keep(step, list(range(len(ids))), ids, reverse_kl=torch.full((len(ids),), 0.5))
    samples.write(step, [Problem(text, (), None) for text in texts], [Response(one, [], False) for one in ids])


def test_a_run_that_starts_again_replaces_later_samples(tmp_path):
    """Behind a checkpoint at step 4, say: what the lost steps wrote must not stay beside the new."""
    first = Samples(tmp_path, toy.make_tokenizer(), 2, "reverse_kl")
    for step in (1, 2, 4, 6):
        write_some(first, step, ("old",))
    write_some(Samples(tmp_path, toy.make_tokenizer(), 2, "reverse_kl"), 4, ("new",))
    assert [(row["step"], row["problem"]) for row in read_jsonl(tmp_path / "samples.jsonl")] == [
        (1, "old"), (2, "old"), (4, "new")]  # fmt: skip


def test_the_page_shows_the_first_and_the_latest_steps(tmp_path):
    samples = Samples(tmp_path, toy.make_tokenizer(), 1, "reverse_kl")
    for step in range(1, 21):
        write_some(samples, step)
    shown = re.findall(r"<h2>Step (\d+)</h2>", (tmp_path / "samples.html").read_text())
    assert shown == ["20", "19", "18", "17", "16", "1"]


def test_tokens_that_share_a_character_show_it_at_the_last():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    ids = list("né🙂\n".encode())
    assert token_texts(Bytes(), ids) == ["n", "", "é", "", "", "", "🙂", "\n"]
    assert "".join(token_texts(Bytes(), [0xFF] * 4)), "bytes that never make a character are shown all the same"


class Reader(html.parser.HTMLParser):
    """Tags and text of a page as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.tips = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.tips += [attributes["data-t"]] if "data-t" in attributes else []
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text():
    hostile = ["</span></div><script>alert(1)</script>", "\" onmouseover=\"alert(1)", "<img src=x onerror=alert(1)>", "&lt;",
               "'\n\t\r", "]]>", "<!--", "</style>"]  # fmt: skip
    row = {"step": 1, "problem": "<script>x</script>", "response": "", "truncated": False, "reward": 1.0, "advantage": None,
           "tokens": hostile, "values": {"reverse_kl": [0.5] * len(hostile)}}  # fmt: skip
    reader = Reader()
    reader.feed(page("<b>run</b>", [row], "reverse_kl"))
    allowed = {"html", "meta", "title", "style", "h1", "h2", "p", "div", "span", "article", "b", "i"}
    assert set(reader.tags) <= allowed and "script" not in reader.tags
    for text, tip in zip(hostile, reader.tips, strict=True):
        assert json.loads(tip.split("\n")[0]) == text and tip.split("\n")[1] == "reverse_kl 0.5000"
        assert text.replace("\n", "↵\n").replace("\r", "") in reader.text.replace("\r", "")
    document = page("run", [row], "reverse_kl")
    assert "http" not in document and "url(" not in document, "self-contained"


def test_levels_follow_the_kl():
    row = {"step": 1, "problem": "p", "response": "", "truncated": True, "reward": None, "advantage": 0.5,
           "tokens": ["a"] * 5, "values": {"reverse_kl": [0.0, 0.01, 0.2, 1.0, 7.0]}}  # fmt: skip
    document = page("run", [row], "reverse_kl").split('class="tokens"')[1]
    assert re.findall(r'class="t l(\d)"', document) == ["0", "1", "3", "5", "6"]
    whole = page("run", [row], "reverse_kl")
    assert "tokens <b>5, cut off</b>" in whole and "mean <b>1.6420</b>" in whole and "highest <b>7.000</b>" in whole
    assert "reward" not in whole and "advantage <b>0.5</b>" in whole


def test_a_long_response_is_cut_on_the_page_only():
    n = samples_page.PAGE_TOKENS + 5
    row = {"step": 1, "problem": "p", "response": "", "truncated": False, "reward": None, "advantage": None,
           "tokens": ["a"] * n, "values": {"reverse_kl": [0.0] * n}}  # fmt: skip
    document = page("run", [row], "reverse_kl")
    assert document.count("data-t=") == samples_page.PAGE_TOKENS and "and 5 tokens more" in document


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: apt-get install chromium")
def test_a_browser_reads_the_page(train, tmp_path):
    """Chromium's own tree of the document: as many tokens as there are, and text that was hostile is text."""
    run = train("opd", max_steps=1)
    rows = read_jsonl(run.out / "samples.jsonl")
    rows[0]["tokens"][0] = "<script>document.title = 'hacked'</script>"
    (tmp_path / "page.html").write_text(page("run", rows, "reverse_kl"), encoding="utf-8")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    dom = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    )
    assert "<title>Samples of run</title>" in dom.stdout and "<script" not in dom.stdout
    assert dom.stdout.count("data-t=") == sum(len(row["tokens"]) for row in rows)
