"""The summary against figures worked out by hand, with rewards that a fake grader decides."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, write_jsonl

import eval_math
import toy
from eval_math import pass_at_k
from infra import dataset, evaluation, run_folder, samples_page
from infra.bootstrap import bootstrap_ci95
from infra.cli import RunStopped, UsageError
from infra.sampler_hf import HFSampler

RIGHT = {"p0": 4, "p1": 2, "p2": 0, "p3": 1, "p4": 4, "p5": 3}  # right answers of 4 samples


@pytest.fixture
def measure(run_script, fake_grader, checkpoints, data, tmp_path):
    """eval_math.py on six problems with four samples each; RIGHT says how many of them are right."""
    fake_grader(lambda answer, j: float(j < RIGHT[answer]))

    def start(name="result", **changes):
        args = {"model": checkpoints.student, "benchmarks": (data,), "limit": 6, "samples": 4, "max_response_tokens": 12}
        return run_script("eval_math", out=tmp_path / name, **(args | changes)).out

    return start


def test_summary_equals_the_hand_computed_figures(measure):
    out = measure()
    summary = json.loads((out / "data" / "summary.json").read_text())
    assert set(summary) == {"accuracy", "ci95", "pass_at_k", "truncated_frac", "response_length", "problems", "samples",
                            "out_of_vocab", "unparsable", "grader_timeouts", "kept_problems", "seconds", "command",
                            "regraded", "benchmark", "inputs", "args"}  # fmt: skip
    assert summary["kept_problems"] == 0 and summary["regraded"] is None and summary["benchmark"].endswith("data.jsonl")
    assert set(summary["inputs"]) == {"model", "benchmark", "problems"}, "and no grader, which is no file here"
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in summary["inputs"].values())
    assert summary["accuracy"] == pytest.approx(14 / 24) and (summary["problems"], summary["samples"]) == (6, 4)
    # pass@2: 1 - C(4 - c, 2) / 6 for c = 4, 2, 0, 1, 4, 3 right of 4
    assert summary["pass_at_k"] == pytest.approx({"1": 14 / 24, "2": (1 + 5 / 6 + 0 + 3 / 6 + 1 + 1) / 6, "4": 5 / 6})
    low, high = summary["ci95"]
    assert 0 <= low < summary["accuracy"] < high <= 1
    rows = read_jsonl(out / "data" / "generations.jsonl")
    assert summary["response_length"] == pytest.approx(np.mean([row["length"] for row in rows]))
    assert summary["truncated_frac"] == pytest.approx(np.mean([row["truncated"] for row in rows]))
    assert summary["args"]["samples"] == 4 and summary["command"].startswith("python eval_math.py")


def test_every_generation_is_written(measure, data):
    rows = read_jsonl(measure() / "data" / "generations.jsonl")
    problems = dataset.load_problems(data, "--benchmarks", True)[:6]
    assert [(row["problem"], row["sample"]) for row in rows] == [(p.text, j) for p in problems for j in range(4)]
    assert [row["reward"] for row in rows] == [float(j < RIGHT[f"p{i}"]) for i in range(6) for j in range(4)]
    assert [row["answer"] for row in rows] == [f"p{i}" for i in range(6) for _ in range(4)]
    tokenizer = toy.make_tokenizer()
    for row in rows:  # the text is the response alone, without the turn's end
        assert set(row) == {"problem", "answer", "sample", "reward", "length", "truncated", "response"}
        assert 1 <= row["length"] <= 12 and "<|im_end|>" not in row["response"]
        assert len(tokenizer(row["response"], add_special_tokens=False)["input_ids"]) <= row["length"]


def test_accuracy_is_that_of_the_real_grader(run_script, world):
    """Rewards equal the last box compared with the answer, on the toy's digits."""
    run = run_script(
        "eval_math",
        model=str(world / "teacher_base"),
        benchmarks=(str(world / "test.jsonl"),),
        samples=8,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_response_tokens=40,
    )
    rows = read_jsonl(run.out / "test" / "generations.jsonl")
    for row in rows:
        box = row["response"].rpartition("\\boxed{")[2]
        if row["response"].count("\\boxed{") and "}" in box:
            digits = box[: box.index("}")]
            if digits.isdigit():
                assert row["reward"] == float(int(digits) == int(row["answer"])), row
        else:
            assert row["reward"] == 0, row
    assert 0 < sum(row["reward"] for row in rows) < len(rows)


def test_the_same_seed_gives_the_same_generations(measure):
    texts = [[row["response"] for row in read_jsonl(measure(name, seed=seed) / "data" / "generations.jsonl")]
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_several_benchmarks_have_a_folder_each(measure, tmp_path, data):
    other = write_jsonl(tmp_path / "other.jsonl", [{"problem": "9-9?", "answer": "p0"}])
    out = measure(benchmarks=(data, other))
    assert {path.name for path in out.iterdir()} == {"data", "other"}
    assert json.loads((out / "other" / "summary.json").read_text())["accuracy"] == 1


def test_the_paper_sampling_settings_are_the_defaults():
    args = eval_math.Args()
    assert (args.temperature, args.top_p, args.top_k, args.samples) == (0.7, 0.8, 20, 16)


# ------------------------------------------------------------------------------------------------------------ survival
class Killed(BaseException):
    """Stands for kill -9: nothing behind it runs."""


@pytest.fixture
def batches(monkeypatch):
    """`batches.stop = k` ends the process behind so many batches; `batches.done` counts the responses sampled."""
    state, sample = SimpleNamespace(stop=None, done=0), HFSampler._sample_batch

    def counted(self, prompts, seeds, progress):
        if state.stop == 0:
            raise Killed
        state.stop = None if state.stop is None else state.stop - 1
        state.done += len(seeds)
        return sample(self, prompts, seeds, progress)

    monkeypatch.setattr(HFSampler, "_sample_batch", counted)
    return state


SPLIT = {"rollout_batch_tokens": 150, "limit": 12}  # one to two prompts a batch
FIGURES = ("accuracy", "ci95", "pass_at_k", "truncated_frac", "response_length", "problems")


def killed(measure, batches, name, stop=8, **changes):
    batches.stop = stop
    with pytest.raises(Killed):
        measure(name, **SPLIT | changes)
    batches.stop, batches.done = None, 0
    return measure.folder / name / "data"


@pytest.fixture
def small(measure, fake_grader, tmp_path):
    fake_grader(lambda answer, j: float((int(answer[1:]) + j) % 3 == 0))

    def start(name, **changes):
        return measure(name, **SPLIT | changes) / "data"

    start.folder = tmp_path
    return start


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(small, batches):
    whole = small("whole")
    everything = batches.done
    assert everything == 48
    folder = killed(small, batches, "killed")
    assert not (folder / "summary.json").exists() and not (folder / "generations.jsonl").exists()
    with (folder / "partial_0.jsonl").open("a") as file:  # as kill -9 leaves it, in the middle of a character's escape
        file.write('{"2+2?": [[[1, 2], [-0.5, \\u00')
    small("killed")
    assert 0 < batches.done < everything / 2
    assert (folder / "generations.jsonl").read_bytes() == (whole / "generations.jsonl").read_bytes()
    a, b = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    assert all(a[key] == b[key] for key in FIGURES) and b["kept_problems"] == 12 - batches.done / 4
    assert not list(folder.glob("partial*"))


def test_torn_lines_are_counted(small, batches, capsys):
    folder = killed(small, batches, "killed")
    lines = (folder / "partial_0.jsonl").read_text().splitlines()
    (folder / "partial_0.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    small("killed")
    assert "1 torn lines cut (first: partial_0.jsonl line 2); what they held is sampled again" in capsys.readouterr().out
    assert (folder / "generations.jsonl").read_bytes() == (small("whole") / "generations.jsonl").read_bytes()


def test_what_other_ranks_have_left_is_taken_up(small, batches):
    """Another number of ranks goes on with all that was written."""
    folder = killed(small, batches, "killed")
    lines = (folder / "partial_0.jsonl").read_text().splitlines(keepends=True)
    (folder / "partial_0.jsonl").write_text("".join(lines[::2]))
    (folder / "partial_1.jsonl").write_text("".join(lines[1::2]))
    small("killed")
    assert batches.done < 24
    assert (folder / "generations.jsonl").read_bytes() == (small("whole") / "generations.jsonl").read_bytes()


def test_a_finished_benchmark_is_not_measured_again(small, batches, capsys, data, tmp_path):
    folder = small("a")
    before, batches.done = (folder / "summary.json").read_bytes(), 0
    shown = capsys.readouterr().out
    assert small("a") == folder and batches.done == 0 and (folder / "summary.json").read_bytes() == before
    assert shown.strip() in capsys.readouterr().out and not list(folder.glob("partial*"))
    other = write_jsonl(tmp_path / "other.jsonl", [{"problem": "9-9?", "answer": "p0"}])
    small("a", benchmarks=(data, other))  # one more benchmark: only that one
    assert batches.done == 4 and (folder / "summary.json").read_bytes() == before
    small("a", overwrite=True)
    assert batches.done == 4 + 48 and (folder / "summary.json").read_bytes() != before


def test_flags_that_change_no_response_may_change(small, batches):
    killed(small, batches, "a")
    assert small("a", rollout_batch_tokens=10_000) and batches.done < 48


@pytest.mark.parametrize("changes, message", [
    ({"temperature": 0.5}, "--temperature was 0.7, now 0.5"),
    ({"limit": 11}, "--limit was 12, now 11"),
    ({"samples": 3, "seed": 2}, "--samples was 4, now 3; --seed was 1, now 2"),
    ({"grader": "boxed"}, "--grader was 'math', now 'boxed'"),
    ({"model": "wide"}, r"--model was .*student.*, now .*wide\d+'"),
    ({"benchmarks": "replaced"}, "--benchmarks .*data.jsonl had other contents"),
])  # fmt: skip
@pytest.mark.parametrize("at", ["killed", "finished"])
def test_another_command_is_refused(small, batches, checkpoints, data, at, changes, message):
    folder = killed(small, batches, "a") if at == "killed" else small("a")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "model" in changes:
        changes = {"model": checkpoints.wide}
    if "benchmarks" in changes:
        Path(data).write_text(Path(data).read_text().replace("p3", "p0"))
        changes = {}
    with pytest.raises(UsageError, match=f"a/data: measured before, {message}: repeat its flags, .*, or give --overwrite"):
        small("a", **changes)
    assert files.keys() == {path.name for path in folder.iterdir()}
    assert all(path.read_bytes() == files[path.name] for path in folder.iterdir())
    assert small("a", overwrite=True, **changes)


def test_a_replaced_model_is_refused_and_a_moved_one_is_not(small, batches, checkpoints, tmp_path):
    model = shutil.copytree(checkpoints.student, tmp_path / "model")
    folder = small("a", model=str(model))
    moved = shutil.copytree(model, tmp_path / "moved")
    batches.done = 0
    assert small("a", model=str(moved)) == folder and batches.done == 0
    shutil.copy(f"{checkpoints.wide}/model.safetensors", moved)
    shutil.copy(f"{checkpoints.wide}/config.json", moved)
    with pytest.raises(UsageError, match="--model was .*/model', now .*/moved'"):
        small("a", model=str(moved))


def test_a_killed_evaluation_without_responses_binds_nothing(small, batches):
    killed(small, batches, "a", stop=0)
    assert small("a", temperature=0.5)


def test_generations_without_a_summary_are_not_written_over(small):
    folder = small("a")
    (folder / "summary.json").write_text('{"accuracy": 0.')
    with pytest.raises(UsageError, match="has generations.jsonl without a whole summary.json"):
        small("a")
    assert small("a", overwrite=True)


def test_two_processes_on_one_folder_are_refused(small):
    folder = small("a")
    held = run_folder.lock_folder(folder)
    with pytest.raises(UsageError, match="another process is writing there"):
        small("a")
    held.close()
    assert small("a")


def test_a_full_disk_ends_in_one_line(small, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_aside", full)
    with pytest.raises(RunStopped, match="No space left on device; make room, then run the same command again"):
        small("a")


def test_models_of_the_same_name_have_results_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B"):
        (tmp_path / name / "final").mkdir(parents=True)
    folders = [evaluation.default_out(model) for model in ("A/final", "B/final", f"{tmp_path}/A/final/", "Qwen/Qwen3-8B")]
    assert list(map(str, folders)) == ["results/A_final", "results/B_final", "results/A_final", "results/Qwen_Qwen3-8B"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_at_two_thirds(world, tmp_path, ranks):
    """The real thing: the process is killed, the same line is given again. Counted are batches that were written."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    data = [{"problem": f"{i}+{j}?", "answer": str((i + j) % 10)} for i in range(9) for j in range(10)]
    data = write_jsonl(tmp_path / "data.jsonl", data)
    command = [sys.executable, *launcher, str(ROOT / "eval_math.py"), "--model", f"{world}/student_base"]
    command += ["--benchmarks", data, "--instruction", "", "--max-response-tokens", "64", "--rollout-batch-tokens", "3000"]
    command += ["--samples", "16", "--temperature", "1", "--top-p", "1", "--top-k", "0"]
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")]).returncode == 0
    out = tmp_path / "killed" / "data"
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")])
    while process.poll() is None and written(out) < 60:
        time.sleep(0.005)
    assert process.poll() is None, "too fast to be killed"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if ranks > 1 else []
    for pid in [process.pid, *map(int, children)]:  # torchrun, then its ranks
        os.kill(pid, signal.SIGKILL)
    process.wait()
    kept = written(out)
    assert subprocess.run([*command, "--out", str(tmp_path / "killed")]).returncode == 0
    assert (out / "generations.jsonl").read_bytes() == (tmp_path / "whole" / "data" / "generations.jsonl").read_bytes()
    assert json.loads((out / "summary.json").read_text())["kept_problems"] >= kept > 0


def written(folder) -> int:
    """Problems whose responses are in the partial files."""
    lines = [line for path in folder.glob("partial_*.jsonl") for line in path.read_bytes().splitlines()]
    return sum(line.count(b"?\": [") for line in lines)


# -------------------------------------------------------------------------------------------------------------- regrade
def test_regrade_changes_rewards_and_summary_and_says_how_many(small, fake_grader, capsys):
    folder = small("a")
    before, rows = json.loads((folder / "summary.json").read_text()), read_jsonl(folder / "generations.jsonl")
    fake_grader(lambda answer, j: float((int(answer[1:]) + j) % 3 == 0 or answer == "p1"))
    capsys.readouterr()
    eval_math.main(eval_math.Args(regrade=str(folder.parent), grader="boxed"))
    now, graded = json.loads((folder / "summary.json").read_text()), read_jsonl(folder / "generations.jsonl")
    changed = [k for k, (a, b) in enumerate(zip(rows, graded, strict=True)) if a != b]
    assert {rows[k]["answer"] for k in changed} == {"p1"} and len(changed) == 3
    assert all(a | {"reward": b["reward"]} == b for a, b in zip(rows, graded, strict=True))
    assert now["accuracy"] == pytest.approx(before["accuracy"] + 3 / 48)
    assert now["args"] == before["args"] | {"grader": "boxed"} and now["command"] == before["command"] and now["regraded"]
    out = capsys.readouterr().out
    assert f"accuracy {before['accuracy']:.4f} before, {now['accuracy']:.4f} now: 3 of 48 verdicts have changed" in out
    assert "first: None for 'p1', 0 before, 1 now, sample 0 of '3*4-5?'" in out
    eval_math.main(eval_math.Args(regrade=str(folder), grader="boxed"))
    assert "0 of 48 verdicts have changed" in capsys.readouterr().out


def test_regrading_with_the_same_grader_changes_nothing(run_script, world, capsys):
    """The real grader, and the text that was graded is the text that is saved."""
    test = str(world / "test.jsonl")
    run = run_script("eval_math", model=str(world / "teacher_base"), benchmarks=(test,), samples=8, max_response_tokens=40)
    before = (run.out / "test" / "generations.jsonl").read_bytes()
    eval_math.main(eval_math.Args(regrade=str(run.out)))
    assert "0 of 64 verdicts have changed" in capsys.readouterr().out
    assert (run.out / "test" / "generations.jsonl").read_bytes() == before


def test_regrade_refuses_what_is_not_finished(small, batches, cli, tmp_path):
    folder = small("a")
    (folder / "generations.jsonl").write_text("".join((folder / "generations.jsonl").read_text().splitlines(True)[:-1]))
    code, _, err = cli("eval_math", "--regrade", folder)
    assert code == 2 and "47 responses where summary.json says 48" in err
    code, _, err = cli("eval_math", "--regrade", killed(small, batches, "b"))
    assert code == 2 and "no generations.jsonl there" in err


# ----------------------------------------------------------------------------------------------------------------- page
def test_the_page_shows_wrong_answers_first(run_script, world):
    test = str(world / "test.jsonl")
    flags = {"samples": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": 40}
    out = run_script("eval_math", model=str(world / "teacher_base"), benchmarks=(test,), **flags).out / "test"
    page = (out / "samples.html").read_text(encoding="utf-8")
    wrong, right = page.index("<h2>Wrong answers: 8 of 8 problems that have one</h2>"), page.index("<h2>Right answers")
    assert wrong < right and page[wrong:right].count("<article>") == 8
    assert "verdict <b>wrong, " in page[wrong:right] and "verdict <b>right" not in page[wrong:right]
    assert "verdict <b>right, " in page[right:] and "reference <b>" in page and "answer <b>" in page
    assert "surprisal 0." in page[wrong:right] and "class=\"t l" in page  # coloured by the sampler's surprisal
    eval_math.main(eval_math.Args(regrade=str(out)))  # nothing to colour by, and no tokenizer
    plain = (out / "samples.html").read_text(encoding="utf-8")
    assert "surprisal 0." not in plain and plain.count("<article>") == page.count("<article>")


def test_the_page_is_bounded_and_escapes_what_a_model_writes():
    rows = [{"problem": f"<p{i}>", "answer": "<a>", "sample": j, "reward": float(i >= 500 and j == 1), "length": 3,
             "truncated": False, "response": "\\boxed{<b>}"} for i in range(1000) for j in range(2)]  # fmt: skip
    page = samples_page.evaluation_page("x", rows, 2)
    assert page.count("<article>") == samples_page.PAGE_WRONG + samples_page.PAGE_RIGHT
    assert f"{samples_page.PAGE_WRONG} of 1000 problems" in page and f"{samples_page.PAGE_RIGHT} of 500 problems" in page
    assert "answer <b>&lt;b&gt;</b>" in page and "reference <b>&lt;a&gt;</b>" in page and "<p5" not in page


# ------------------------------------------------------------------------------------------------------------ formulas
def test_pass_at_k_equals_the_share_of_all_subsets():
    rewards = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        expected = np.mean([[max(row[list(chosen)]) for chosen in combinations(range(5), k)] for row in rewards])
        assert pass_at_k(rewards, k) == pytest.approx(expected)


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    rng = np.random.default_rng(5)
    values = (rng.random(400) < 0.3).astype(float)
    low, high = bootstrap_ci95(values)
    half = 1.96 * values.std() / len(values) ** 0.5
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.005) and (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert bootstrap_ci95(values) == [low, high]
    assert bootstrap_ci95(np.ones(7)) == [1, 1] and bootstrap_ci95(np.array([0.25])) == [0.25, 0.25]


# ------------------------------------------------------------------------------------------------------------- compare
def result(folder, rewards, problems=None):
    """A result folder with `rewards` {benchmark: (P, samples)}."""
    for name, rows in rewards.items():
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "generations.jsonl", [
            {"problem": str((problems or {}).get(name, range(len(rows)))[i]), "sample": j, "reward": reward}
            for i, row in enumerate(rows) for j, reward in enumerate(row)])  # fmt: skip
    return str(folder)


def test_compare_gives_the_paired_difference(tmp_path):
    """Problems differ much from each other and the models little: paired, the difference is clear."""
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5
    a = [[1.0, 1.0] if h else [0.0, float(i % 10 == 0)] for i, h in enumerate(hard)]
    b = [[1.0] if h else [0.0] for h in hard]  # another number of samples
    report = eval_math.compare(result(tmp_path / "a", {"x": a}), result(tmp_path / "b", {"x": b}))
    expected = np.mean(np.mean(a, 1) - np.mean(b, 1))
    assert report["x"]["difference"] == pytest.approx(expected) and report["x"]["problems"] == 200
    low, high = report["x"]["ci95"]
    assert 0 < low < expected < high < 0.1


def test_compare_ignores_the_order_of_the_problems(tmp_path):
    a = result(tmp_path / "a", {"x": [[1], [0], [1]]}, {"x": ["p", "q", "r"]})
    b = result(tmp_path / "b", {"x": [[1], [1], [0]]}, {"x": ["r", "p", "q"]})
    assert eval_math.compare(a, b)["x"]["difference"] == 0 and eval_math.compare(a, b)["x"]["ci95"] == [0, 0]


def test_compare_takes_folders_of_one_benchmark_or_of_several(tmp_path):
    both = {"x": [[1], [0]], "y": [[0], [0]]}
    a, b = result(tmp_path / "a", both), result(tmp_path / "b", {"y": [[1], [0]], "z": [[1]]})
    assert list(eval_math.compare(a, b)) == ["y"] and eval_math.compare(a, b)["y"]["difference"] == -0.5
    assert eval_math.compare(f"{a}/x", f"{b}/y")["x"]["difference"] == 0


@pytest.mark.parametrize("changes, message", [
    ({"samples": 2}, "--samples is in .*/a/data 4, in .*/b/data 2"),
    ({"temperature": 1.0, "top_k": 0}, "--temperature .* 0.7, in .* 1.0"),
    ({"grader": "boxed"}, "--grader .* 'math', in .* 'boxed'"),
    ({"max_response_tokens": 11}, "--max-response-tokens .* 12, in .* 11"),
    ({"dtype": "float64"}, "--dtype .* 'float32', in .* 'float64'"),
    ({"instruction": "Think."}, "--instruction .* '', in .* 'Think.'"),
])  # fmt: skip
def test_compare_warns_of_what_makes_results_incomparable(measure, cli, tmp_path, changes, message):
    measure("a"), measure("b", **changes)
    code, out, _ = cli("eval_math", "--compare", tmp_path / "a", tmp_path / "b")
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert code == 0 and len(warnings) == len(changes) and re.search(message, warnings[0]), out
    assert "(6 problems, paired)" in out


def test_compare_warns_of_another_benchmark_file(measure, cli, tmp_path, data):
    measure("a")
    Path(data).write_text(Path(data).read_text().replace('"p1"', '"p0"'))
    measure("b", seed=2)
    code, out, _ = cli("eval_math", "--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "--benchmarks" in out and "had other contents" in out
    assert "1 problems have another reference answer there (first: '3*4-5?')" in out


def test_comparable_results_give_no_warning(measure, cli, checkpoints, tmp_path):
    measure("a"), measure("b", model=checkpoints.wide, seed=5, rollout_batch_tokens=99)
    assert "warning" not in cli("eval_math", "--compare", tmp_path / "a", tmp_path / "b")[1]


def test_compare_says_what_it_leaves_out_and_cannot_know(cli, tmp_path):
    a, b = result(tmp_path / "a", {"x": [[1]], "y": [[1]]}), result(tmp_path / "b", {"x": [[1]]})
    code, out, _ = cli("eval_math", "--compare", a, b)
    assert code == 0 and "--compare: y left out, which only one of them has" in out
    assert "warning: x: " in out and "has no whole summary.json: how it was sampled is not known" in out


@pytest.mark.parametrize("rewards, problems, message", [
    ({"x": [[1], [0]]}, {"x": ["p", "q"]}, "x was measured on different problems"),
    ({"x": [[1]]}, {"x": ["p"]}, "different problems.*--limit"),
])  # fmt: skip
def test_compare_refuses_different_problems(tmp_path, rewards, problems, message):
    a = result(tmp_path / "a", {"x": [[1], [0]]}, {"x": ["p", "r"]})
    with pytest.raises(UsageError, match=message):
        eval_math.compare(a, result(tmp_path / "b", rewards, problems))


def test_compare_refuses_different_benchmarks(tmp_path):
    a = result(tmp_path / "a", {"x": [[1]], "y": [[1]]})
    with pytest.raises(UsageError, match="share no benchmark"):
        eval_math.compare(a, result(tmp_path / "b", {"z": [[1]]}))


def test_the_compare_command_prints_what_compare_returns(cli, tmp_path):
    a, b = result(tmp_path / "a", {"x": [[1], [1], [0]]}), result(tmp_path / "b", {"x": [[1], [0], [0]]})
    code, out, _ = cli("eval_math", "--compare", a, b)
    assert code == 0 and "x: +0.3333  95 % interval [+0.0000, +1.0000]  (3 problems, paired)" in out
