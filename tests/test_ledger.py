"""What a run says it has used: labels, and that it uses no other; updates, sampled tokens and FLOPs."""

import json

import pytest
import torch
from conftest import load, read_jsonl, write_jsonl
from test_scripts import mixed_rule

from infra import dataset, run_folder
from infra.cli import RunStopped

SMALL = {"max_response_tokens": 4, "max_steps": 2, "temperature": 1.0}


def grpo(checkpoints, data, **more):
    sizes = {"prompts_per_step": 4, "minibatch_prompts": 2, "group_size": 2}
    return {"model": checkpoints.student, "train_data": data} | sizes | SMALL | more


def opd(checkpoints, data, **more):
    return (
        {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data, "prompts_per_step": 6}
        | SMALL
        | more
    )


def warmup(checkpoints, data, **more):
    sizes = {"rollouts_per_step": 6, "rollouts_per_prompt": 2}
    return {"teacher": checkpoints.wide, "student": checkpoints.student, "train_data": data} | sizes | SMALL | more


@pytest.fixture
def half(data, tmp_path):
    """A label split of the first six of the twelve problems."""
    return write_jsonl(tmp_path / "half.jsonl", read_jsonl(tmp_path / "data.jsonl")[:6])


# --------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("script, args", [("grpo", grpo), ("variants/opd_weighted", opd), ("variants/fkl_weighted", warmup)])
def test_a_label_outside_the_split_is_never_consulted(
    run_script, fake_grader, checkpoints, data, half, tmp_path, script, args
):
    asked = []
    fake_grader(lambda answer, j: asked.append(answer) or float(j % 2))
    weighted = {} if script == "grpo" else {"reward_weight": 1.0}
    with pytest.raises(RunStopped, match="a label outside --label-split"):
        run_script(script, **args(checkpoints, data, label_split=half, out=str(tmp_path / "run"), max_steps=9, **weighted))
    assert set(asked) <= {f"p{i}" for i in range(6)}, "the grader was asked about another"
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert not record["finished"] and "a label outside" in record["stopped"]


def test_pass_rates_are_labels_too(run_script, checkpoints, data, half, tmp_path):
    rows = [{"problem": row["problem"], "reward": float(k)} for row in read_jsonl(tmp_path / "data.jsonl") for k in (0, 1)]
    rates = write_jsonl(tmp_path / "generations.jsonl", rows)
    with pytest.raises(RunStopped, match="a label outside --label-split"):
        run_script("variants/opd_weighted", **opd(checkpoints, data, paced=rates, label_split=half))


def test_inside_its_split_a_run_is_what_it_is_without_one(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    free = run_script("grpo", **grpo(checkpoints, data))
    bound = run_script("grpo", **grpo(checkpoints, data, label_split=data))
    for name, tensor in load(free.out).state_dict().items():
        assert torch.equal(tensor, load(bound.out).state_dict()[name])
    labels = json.loads((bound.out / "labels.json").read_text())
    assert len(labels) == bound.record["labels_used"] == 8 and set(labels) <= {r["problem"] for r in read_jsonl_of(data)}


def read_jsonl_of(path):
    return dataset.load_rows(path, "--x")


def test_dense_stages_do_not_mind_problems_outside(run_script, checkpoints, data, half):
    """They consult no answer, so the bound does not touch them."""
    run = run_script("opd", **opd(checkpoints, data, label_split=half))
    assert run.record["finished"] and json.loads((run.out / "labels.json").read_text()) == []


# ----------------------------------------------------------------------------------------------------------------- costs
def params(folder):
    return sum(p.numel() for p in load(folder).parameters())


def test_opd_counts_its_tokens_and_flops(run_script, checkpoints, data):
    run = run_script("opd", **opd(checkpoints, data))
    sampled = sum(len(r.ids) for _, _, responses in run.samples for r in responses)
    read = sampled + sum(len(prompt) for prompts, _, _ in run.samples for prompt in prompts)
    P, T = params(checkpoints.student), params(checkpoints.wide)
    expected = {"updates": 2, "sampled_tokens": sampled, "flops": 2 * P * read + 2 * T * read + 6 * P * read}
    assert {key: run.record[key] for key in expected} == expected, (
        "the student samples, the teacher reads, the student trains"
    )


def test_fkl_warmup_counts_its_rollouts_once(run_script, checkpoints, data):
    run = run_script("fkl_warmup", **warmup(checkpoints, data))
    [(prompts, n, responses)] = run.samples
    sampled, asked = sum(len(r.ids) for r in responses), n * sum(map(len, prompts))
    trained = sum(len(p) + len(r) for ps, rs in run.passes for p, r in zip(ps, rs, strict=True))
    P, T = params(checkpoints.student), params(checkpoints.wide)
    expected = {"updates": 2, "sampled_tokens": sampled, "flops": 2 * T * (sampled + asked) + (2 * T + 6 * P) * trained}
    assert {key: run.record[key] for key in expected} == expected
    again = run_script("fkl_warmup", **warmup(checkpoints, data, rollouts=str(run.out / "rollouts.jsonl")))
    assert {key: again.record[key] for key in expected} == expected, "given rollouts cost what it took to make them"


def test_grpo_counts_what_it_passes_through_the_model(run_script, fake_grader, checkpoints, data):
    fake_grader(mixed_rule)
    run = run_script("grpo", **grpo(checkpoints, data))
    sampled = sum(len(r.ids) for _, _, responses in run.samples for r in responses)
    asked = sum(n * len(prompt) for prompts, n, _ in run.samples for prompt in prompts)
    trained = [sum(len(p) + len(r) for p, r in zip(ps, rs, strict=True)) for ps, rs in run.passes]
    P, updates = params(checkpoints.student), len(run.updates)
    assert run.record["updates"] == updates and run.record["sampled_tokens"] == sampled
    most = P * (2 * (sampled + asked) + 8 * sum(trained))  # the first minibatch of a step is not scored
    assert P * (2 * (sampled + asked) + 6 * sum(trained)) < run.record["flops"] < most


def test_a_budget_of_flops_ends_the_run_behind_the_step_that_reaches_it(
    run_script, fake_grader, checkpoints, data, tmp_path, monkeypatch
):
    fake_grader(mixed_rule)
    whole = run_script("grpo", **grpo(checkpoints, data, max_steps=3))
    bounds = {"max_steps": 9, "max_flops": float(whole.record["flops"]), "eval_every": 9, "eval_data": data}
    make_bar, bars = run_folder.progress_bar, []
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "progress_bar", lambda *a: bars.append(make_bar(*a)) or bars[-1])
        bound = run_script("grpo", **grpo(checkpoints, data, **bounds))
    assert (bars[0].n, bars[0].total) == (3, 3), "the bar ends where the FLOPs do, not at --max-steps"
    assert [row["step"] for row in bound.metrics] == [0, 1, 2, 3] and "eval/accuracy" in bound.metrics[3]
    assert bound.record["flops"] == whole.record["flops"]
    a_little_more = run_script("grpo", **grpo(checkpoints, data, **bounds | {"max_flops": whole.record["flops"] + 1.0}))
    assert len(a_little_more.metrics) == 5
    falling = run_script("grpo", **grpo(checkpoints, data, **bounds | {"learning_rate_decay": "linear"}))
    rates = [row["charts/learning_rate"] / falling.record["args"]["learning_rate"] for row in falling.metrics[1:]]
    assert rates[0] == 1 and 0.3 < rates[1] < 0.8 and 0.05 < rates[2] < 0.5, "with the FLOPs: by steps it would be 7/9"

    out = str(tmp_path / "resumed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run_script("grpo", **grpo(checkpoints, data, **bounds, save_every=3, out=out))
    resumed = run_script("grpo", **grpo(checkpoints, data, **bounds, save_every=3, out=out, resume=True))
    assert resumed.record["flops"] == whole.record["flops"], "nothing is left to do"


def test_a_resumed_run_counts_as_one(run_script, fake_grader, checkpoints, data, tmp_path, monkeypatch):
    fake_grader(mixed_rule)
    whole = run_script("grpo", **grpo(checkpoints, data, max_steps=4))
    out, log = str(tmp_path / "resumed"), run_folder.Run.log

    def stop_at_3(self, step, *a, **kw):
        if step == 3:
            raise KeyboardInterrupt
        return log(self, step, *a, **kw)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.Run, "log", stop_at_3)
        run_script("grpo", **grpo(checkpoints, data, max_steps=4, save_every=2, out=out))
    resumed = run_script("grpo", **grpo(checkpoints, data, max_steps=4, save_every=2, out=out, resume=True))
    for key in ("labels_used", "updates", "sampled_tokens", "flops"):
        assert resumed.record[key] == whole.record[key], key
