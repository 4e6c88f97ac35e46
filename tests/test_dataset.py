"""Data is read as meant: files as they are, problems known by more than their text, answers by a stated rule, prompts that
hold the problem; whatever is dropped, merged or unusable is counted and named with its first row."""

import ast
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, write_jsonl

import toy
from infra import columns, dataset, prompts, rows
from infra.cli import UsageError
from infra.dataset import Problem, digest, load_problems, report_ungradable
from infra.prompts import render_all, render_prompt, render_prompts
from infra.rows import load_rows, numbered_rows

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "größer, «∑»\n2?", "answer": "3"}]


def load(path, need_answers=True, **options):
    return load_problems(str(path), "--train-data", need_answers, **options)


def refusal(path, text=None, need_answers=True, **options) -> str:
    """What load_problems says about a file, here written with `text` (str or bytes) first."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load(path, need_answers, **options)
    assert str(caught.value).startswith(("--train-data", "--prompt-column", "--answer-column")) and "\n" not in str(
        caught.value
    )
    return str(caught.value)


def write(path, table: list[dict]):
    """The same rows as the kind of file that the name says."""
    match path.suffix.lower():
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(table), encoding="utf-8")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        case ".csv":
            cells = [list(table[0]), *(row.values() for row in table)]
            quoted = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in cells]
            path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- files
KINDS = [".jsonl", ".json", ".parquet", ".csv"]


@pytest.mark.parametrize("suffix", [*KINDS, ".JSONL", ".Parquet"])
@pytest.mark.parametrize("folder", ["run[1]", "a*b", "what?", "key=value", "~", "with space", "größe"])
def test_a_path_is_taken_literally_and_every_kind_gives_the_same_rows(tmp_path, suffix, folder):
    decoys = [tmp_path / name for name in ("run1", "aXb", "whatX")]
    for place in (*decoys, tmp_path / folder):
        place.mkdir()
        write(place / f"d{suffix}", ROWS if place.name == folder else [{"problem": "a decoy", "answer": "0"}])
    assert load_rows(str(tmp_path / folder / f"d{suffix}"), "--train-data") == ROWS


def test_json_may_hold_its_list_under_data(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert load_rows(str(path), "--train-data") == ROWS


@pytest.mark.parametrize("value", [5, 0.5, "5", "0.5", None, True, [1, "a"], {"a": {"b": 1}}, 10**30])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_cell_keeps_its_type_beside_others_of_its_column(tmp_path, suffix, value):
    table = [{"x": 0.5}, {"x": value}, {"x": "text"}, {"x": 5}]
    read = load_rows(str(write(tmp_path / f"d{suffix}", table)), "--x")
    assert [(type(row["x"]), row["x"]) for row in read] == [(type(row["x"]), row["x"]) for row in table]


@pytest.mark.parametrize("suffix", KINDS)
def test_a_file_rewritten_with_the_same_time_and_size_is_read_anew(tmp_path, suffix):
    path = write(tmp_path / f"d{suffix}", [{"problem": "a", "answer": "1"}])
    time = path.stat().st_mtime_ns
    assert load(path)[0].answer == "1"
    write(path, [{"problem": "a", "answer": "7"}])
    os.utime(path, ns=(time, time))
    assert load(path)[0].answer == "7"


def test_local_files_need_neither_the_hubs_client_nor_a_home(tmp_path):
    """With LC_ALL of another encoding, and a HOME that cannot be written (here: that is a file)."""
    home = tmp_path / "home"
    home.touch()
    paths = [str(write(tmp_path / f"d{suffix}", ROWS)) for suffix in KINDS]
    code = (
        "import sys\nfrom infra.dataset import load_problems\n"
        f"for path in {paths!r}: print(ascii([p.text for p in load_problems(path, '--x', True)]))\n"
        "assert 'datasets' not in sys.modules"
    )
    env = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONUTF8": "0", "LC_ALL": "C"}
    env |= {"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout.splitlines() == [ascii([row["problem"] for row in ROWS])] * 4, run.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, suffix, newline):
    path = write(tmp_path / f"d{suffix}", [{"problem": "größer?", "answer": "2"}, {"problem": "b", "answer": "3"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", newline))
    assert [(p.text, p.answer) for p in load(path)] == [("größer?", "2"), ("b", "3")]


@pytest.mark.parametrize("name", ["d.txt", "d", "d.jsonl.gz", "d.xlsx", "d.ndjson"])
def test_a_file_of_another_kind_is_there_but_not_read(tmp_path, name):
    said = refusal(tmp_path / name, json.dumps(ROWS[0]))
    assert name in said and "the file is there, but only .jsonl, .json, .parquet, .csv are read" in said


@pytest.mark.parametrize("suffix", KINDS)
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, suffix):
    said = refusal(tmp_path / f"nothing{suffix}")
    assert f"nothing{suffix}" in said and "there is no such file. Check the path" in said


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    assert "that is a folder here; give a file in it" in refusal(tmp_path)
    assert "that is a folder here; give a file in it" in refusal(tmp_path / "d.jsonl")
    assert "that is a folder here; give a file in it" in refusal(f"{tmp_path}:default:train")


GOOD = '{"problem": "a", "answer": "1"}\n'


@pytest.mark.parametrize("name, text, place", [
    ("d.jsonl", GOOD + "\n" + '{"problem": \n' + GOOD, "line 3 is not a JSON object"),
    ("d.jsonl", GOOD + '{"problem": "b", "answer": "1"} {"problem": "c"}\n', "line 2 is not a JSON object (Extra data"),
    ("d.jsonl", GOOD * 3 + GOOD[:20], "line 4 is not a JSON object"),
    ("d.jsonl", GOOD + '{"problem": "a", "answer": "1", "answer": "2"}', "line 2 is not a JSON object (the key 'answer'"),
    ("d.jsonl", GOOD + "[1, 2]\n", "line 2: must be a JSON object"),
    ("d.jsonl", GOOD + "\n\n" + "7\n", "line 4: must be a JSON object"),
    ("d.jsonl", GOOD + "[" * 100_000, "line 2 is not a JSON object (nested too deeply)"),
    ("d.jsonl", GOOD.encode() * 2 + '{"problem": "ö"}'.encode("latin-1"), "line 3 is not UTF-8 (byte 0xf6)"),
    ("d.jsonl", GOOD.encode("utf-16"), "line 1 is not UTF-8"),
    ("d.json", GOOD * 2, "one object a line is a .jsonl file: rename it"),
    ("d.json", "[{},\n{},\n{]", "line 3 is not JSON"),
    ("d.json", GOOD, "must hold a list of objects"),
    ("d.json", '{"problem": {"0": "a"}}', "must hold a list of objects"),
    ("d.json", '[{"problem": "a", "answer": "1"}, "b"]', "row 2: must be a JSON object"),
    ("d.json", "", "line 1 is not JSON"),
    ("d.csv", 'problem,answer\n"a\nb",1\nc,d,2\n', "line 4 has 3 cells, not 2; quote what holds a comma"),
    ("d.csv", "problem,answer\na,1\nb\n", "line 3 has 1 cells, not 2"),
    ("d.csv", 'problem,answer\na,1\n"b,2\nc,3\n', "line 3 is not CSV (unexpected end of data)"),
    ("d.csv", "problem,problem\na,1\n", "two columns of the header have one name"),
    ("d.csv", "problem;answer\na;1\n", "the columns are separated by ';'; separate them by commas"),
    ("d.csv", "problem\tanswer\na\t1\n", "separate them by commas"),
    ("d.csv", "problem,answer\n,1\n", "line 2: problem must be a text"),
    ("d.parquet", b"PAR1 no more PAR1", "not a whole parquet file"),
    ("d.parquet", "", "not a whole parquet file"),
    ("d.jsonl", " \n\n", "the dataset is empty"),
    ("d.json", "[]", "the dataset is empty"),
    ("d.csv", "", "the dataset is empty"),
    ("d.csv", "problem,answer\n", "the dataset is empty"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, text, place):
    assert place in refusal(tmp_path / name, text)


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["problem", "problem"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert "two columns have one name" in refusal(tmp_path / "d.parquet")


def test_quoted_cells_of_a_csv_may_hold_commas_lines_and_quotes(tmp_path):
    text = 'answer, problem\r\n1,"a, ""b""\nc"\r\n\r\n2,d\r\n'
    (tmp_path / "d.csv").write_bytes(text.encode())
    assert numbered_rows(str(tmp_path / "d.csv"), "--x") == [
        ("line 2", {"answer": "1", "problem": 'a, "b"\nc'}),
        ("line 5", {"answer": "2", "problem": "d"}),
    ]


def test_a_huge_cell_of_a_csv_is_read(tmp_path):
    write(tmp_path / "d.csv", [{"problem": "x" * 200_000, "answer": "1"}])
    assert len(load(tmp_path / "d.csv")[0].text) == 200_000


# ------------------------------------------------------------------------------------------------------------ problems
@pytest.mark.parametrize("row, text, messages", [
    ({"prompt": [USER]}, "1+1?", ()),
    ({"prompt": [SYSTEM, USER]}, "1+1?", (SYSTEM,)),
    ({"prompt": [SYSTEM, USER | {"content": "Hi"}, {"role": "assistant", "content": "Yes?"}, USER]}, "1+1?",
     (SYSTEM, USER | {"content": "Hi"}, {"role": "assistant", "content": "Yes?"})),
    ({"prompt": [SYSTEM | {"name": None}, USER | {"name": None}]}, "1+1?", (SYSTEM,)),
    ({"prompt": [USER | {"content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}]}, "1+1?", ()),
    ({"problem": "1+1?", "system": "Be brief."}, "1+1?", (SYSTEM,)),
    ({"problem": "1+1?", "system_prompt": "Be brief."}, "1+1?", (SYSTEM,)),
    ({"prompt": [USER], "system": "Be brief."}, "1+1?", (SYSTEM,)),
    ({"prompt": [SYSTEM, USER], "system": "Be brief."}, "1+1?", (SYSTEM,)),
    ({"problem": "1+1?", "system": None}, "1+1?", ()),
    ({"problem": "1+1?", "system": " "}, "1+1?", ()),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chats_and_system_columns_become_messages_before_the_problem(tmp_path, row, text, messages, suffix):
    [problem] = load(write(tmp_path / f"d{suffix}", [row]), need_answers=False)
    assert (problem.text, problem.messages) == (text, messages)


@pytest.mark.parametrize("row, message", [
    ({"prompt": [USER, {"role": "assistant", "content": r"\boxed{2}"}]}, "ends with the assistant's message; the last"),
    ({"prompt": [USER, SYSTEM]}, "ends with the system's message"),
    ({"prompt": [USER, SYSTEM, USER]}, "has a system message behind others"),
    ({"prompt": [{"role": "human", "content": "a"}]}, "role (system, user or assistant)"),
    ({"prompt": [{"from": "human", "value": "a"}]}, "role (system, user or assistant)"),
    ({"prompt": [{"content": "a"}]}, "role (system, user or assistant)"),
    ({"prompt": [{"role": "user", "content": None}]}, "a message whose content is no text"),
    ({"prompt": [USER | {"content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}, "whose content is no text"),
    ({"prompt": [{"role": "user", "content": " "}]}, "prompt must be a text"),
    ({"prompt": "[{'role': 'user', 'content': 'a'}]"}, "a chat written out as text"),
    ({"prompt": '[{"content": "a", "role": "user"}]'}, "a chat written out as text"),
    ({"prompt": " \n"}, "prompt must be a text"),
    ({"prompt": {"role": "user", "content": "a"}}, "prompt must be a text"),
    ({"prompt": 12}, "prompt must be a text"),
    ({"prompt": "half \ud800"}, "half of a surrogate pair"),
    ({"prompt": [SYSTEM, USER], "system": "Be long."}, "system and the chat have different system messages"),
    ({"prompt": "a", "system": "x", "system_prompt": "y"}, "different system messages"),
    ({"prompt": "a", "system": ["x"]}, "system must be a text"),
])  # fmt: skip
def test_a_prompt_that_is_not_clearly_a_question_is_refused_with_its_row(tmp_path, row, message):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "fine"}, row])
    said = refusal(path, need_answers=False)
    assert f"--train-data {path}, line 2: " in said and message in said


def test_a_column_may_be_a_key_inside_another(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"a": {"q": "x", "b": {"c": 7}}, "a.d": "8"}])
    options = {"prompt_column": "a.q", "answer_column": "a.b.c"}
    assert load(path, **options) == [Problem("x", (), "7")]
    assert load(path, **options | {"answer_column": "a.d"}) == [Problem("x", (), "8")]
    assert refusal(path, **options | {"answer_column": "a.e"}) == f"--answer-column a.e: --train-data {path} has only a, a.d"


def test_named_columns_hold_for_eval_data_that_has_them(tmp_path):
    for row in ({"q": "x", "a": "7"}, {"question": "x", "answer": "7"}):
        path = write_jsonl(tmp_path / "d.jsonl", [row])
        options = {"prompt_column": "q", "answer_column": "a"}
        assert load_problems(path, "--eval-data", True, **options) == [Problem("x", (), "7")]
    assert refusal(path, prompt_column="q") == f"--prompt-column q: --train-data {path} has only answer, question"


def test_problems_that_differ_in_the_system_prompt_alone_are_different(tmp_path, capsys):
    table = [{"prompt": [SYSTEM, USER]}, {"prompt": [SYSTEM | {"content": "Think."}, USER]}, {"prompt": "1+1?"}]
    problems = load(write_jsonl(tmp_path / "d.jsonl", [*table, table[0]]), need_answers=False)
    assert len({p.key for p in problems}) == len(problems) == 3 and {p.text for p in problems} == {"1+1?"}
    assert "4 rows are 3 distinct problems: 1 duplicates (first: line 4)" in capsys.readouterr().out


def test_the_key_of_a_problem_without_earlier_messages_is_its_text_and_no_key_depends_on_the_process():
    assert Problem("1+1?", (), None).key == "1+1?"
    assert Problem("1+1?", (SYSTEM,), "2").key == Problem("1+1?", (dict(reversed(SYSTEM.items())),), None).key
    assert Problem("1+1?", (SYSTEM,), None).key == "1+1?\n[after cd9e64c3f068]"


def test_equal_prompts_are_explained(tmp_path, capsys):
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "a", "answer": "1"}] * 64)
    problems = load(path)
    out = capsys.readouterr().out
    assert (
        out == f"--train-data {path}: 64 rows are 1 distinct problem: 63 duplicates (first: line 2)\n" and len(problems) == 1
    )


def test_of_duplicates_the_first_answer_holds_and_others_are_counted(tmp_path, capsys):
    answers = [None, "1", "2", "1", None, "3"]
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "a", "answer": answer} for answer in answers])
    assert load(path) == [Problem("a", (), "1")]
    out = capsys.readouterr().out
    assert "6 rows are 1 distinct problem: 5 duplicates (first: line 2)" in out
    assert "2 duplicates with another answer than an earlier row's, which counts (first: line 3)" in out
    assert "without an answer" not in out


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("answer, text", [
    ("2", "2"), (2, "2"), (0, "0"), (-3, "-3"), (10**40, "1" + "0" * 40), (8.0, "8"), (-0.0, "0"), (0.1, "0.1"),
    (2.5e-3, "0.0025"), (1e-05, "0.00001"), (1e22, "1" + "0" * 22), (1.5e300, "15" + "0" * 299), (-1e-7, "-0.0000001"),
    (["7"], "7"), ([7], "7"), ([8.0], "8"), ("['7']", "7"), ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"), ("[1, 2]", "[1, 2]"),
    ("['a'] or ['b']", "['a'] or ['b']"), (" 5 ", "5"), ("so\n#### 1,234", "1234"), (r"First \boxed{1}", "1"),
    ("8.0", "8.0"), ("1e-05", "1e-05"), ("nan", "nan"),
])  # fmt: skip
def test_answers_become_text_plainly_and_exactly(tmp_path, capsys, answer, text):
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "a", "answer": answer}])
    assert load(path)[0].answer == text and capsys.readouterr().out == ""


def test_a_number_of_more_digits_than_a_float_holds_keeps_them(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"problem": "a", "answer": 3.14159265358979323846}\n{"problem": "b", "answer": 1e400}\n'
    )
    assert [p.answer for p in load(tmp_path / "d.jsonl")] == ["3.14159265358979323846", "1" + "0" * 400]


@pytest.mark.parametrize("answer", [["1", "2"], [], ["1", ["2"]], [["1"]], "['1', '2']", True, False, {"value": 1}, [True],
                                    [""], ["\n"], float("inf"), 10**1000])  # fmt: skip
def test_an_answer_that_is_no_text_or_number_is_none_and_counted(tmp_path, capsys, answer):
    table = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": answer}, {"problem": "c", "answer": answer}]
    path = write_jsonl(tmp_path / "d.jsonl", table)
    assert [p.text for p in load(path)] == ["a"]
    out = capsys.readouterr().out
    assert "2 answers that are no text, number of at most 1000 digits, or list of one, taken for none (first: line 2)" in out
    assert f"2 problems without an answer left out (first: --train-data {path}, line 2)" in out
    assert [p.answer for p in load(path, need_answers=False)] == ["1", None, None]


@pytest.mark.parametrize("blank", [None, "", "  ", float("nan")])
def test_a_blank_answer_is_none_and_the_next_column_counts(tmp_path, capsys, blank):
    table = [{"problem": "a", "answer": blank, "solution": r"\boxed{3}"}, {"problem": "b", "answer": blank}]
    path = write_jsonl(tmp_path / "d.jsonl", table)
    assert load(path) == [Problem("a", (), "3")]
    assert f"1 problems without an answer left out (first: --train-data {path}, line 2)" in capsys.readouterr().out


def test_integers_beside_a_null_in_parquet_are_integers(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"problem": ["a", "b", "c"], "answer": [8, None, 100]}).to_parquet(tmp_path / "d.parquet")
    assert [p.answer for p in load(tmp_path / "d.parquet", need_answers=False)] == ["8", None, "100"]


BAD_BOXES = [
    r"So \boxed{1} or \boxed{2",
    r"\boxed{}",
    r"So \boxed",
    r"$\boxed 12$",
    r"\boxed\frac12",
    r"\boxed 2\pi",
    r"\boxed 2.5",
]


@pytest.mark.parametrize("solution", BAD_BOXES)
def test_a_box_that_cannot_be_read_is_no_answer_and_counted(tmp_path, capsys, solution):
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "a", "answer": "1"}, {"problem": "b", "solution": solution}])
    assert [p.text for p in load(path)] == ["a"]
    assert r"1 answers with a \boxed that cannot be read, taken for none (first: line 2)" in capsys.readouterr().out


def test_a_box_without_braces_is_counted_and_never_a_whole_solution(tmp_path, capsys, monkeypatch):
    """Also with a grader that reads it."""
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "b", "solution": r"It is $\boxed 2$."}])
    [problem] = load(path, need_answers=False)
    assert problem.answer in (None, "2") and r"1 answers" in capsys.readouterr().out
    monkeypatch.setattr(columns, "reference_answer", lambda text: "2")
    assert load(path)[0].answer == "2"
    assert r"1 answers from a \boxed without braces, whose one character" in capsys.readouterr().out


def test_different_boxes_in_a_solution_are_counted_and_the_last_holds(tmp_path, capsys):
    solutions = [
        r"\boxed{1}",
        r"\boxed{1}, again \boxed{1}",
        r"\boxed{1} or \boxed{\frac{1}{2}}",
        r"\boxed{3}, \boxed{4}",
        "\\boxed{1}\n#### 5",
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": f"{i}", "solution": s} for i, s in enumerate(solutions)])
    assert [p.answer for p in load(path)] == ["1", "1", r"\frac{1}{2}", "4", "5"]
    out = capsys.readouterr().out
    assert (
        out == f"--train-data {path}: 2 solutions with several different boxes, of which the last counts (first: line 3)\n"
    )


def test_answers_that_must_not_be_read_are_not(tmp_path, capsys):
    table = [{"problem": "a", "answer": ["1", "2"]}, {"problem": "b", "answer": "1"}, {"problem": "b", "answer": "2"}]
    path = write_jsonl(tmp_path / "d.jsonl", table)
    assert load(path, need_answers=False, answers=False) == [Problem("a", (), None), Problem("b", (), None)]
    assert "answer" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_unlabeled_rows_stay_where_no_answer_is_needed(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "a"}, {"problem": "b", "answer": None}])
    assert load(path, need_answers=False) == [Problem("a", (), None), Problem("b", (), None)]
    assert "needs a column answer, solution or reward_model.ground_truth" in refusal(path)


def test_ungradable_references_are_counted_with_the_first(tmp_path, capsys):
    problems = load(write(tmp_path / "d.csv", [{"problem": str(i), "answer": f"p{i}"} for i in range(4)]))
    report_ungradable(problems, [True] * 4)
    assert capsys.readouterr().out == ""
    report_ungradable(problems, [True, False, True, False])
    assert (
        f"cannot read 2 of 4 reference answers (first: --train-data {tmp_path / 'd.csv'}, line 3: 'p1')"
        in capsys.readouterr().out
    )


def test_the_digest_follows_problems_messages_answers_and_order():
    a, b = Problem("a", (), "1"), Problem("b", (), "2")
    others = [
        [b, a],
        [a],
        [a, b, b],
        [a, Problem("b", (), None)],
        [a, Problem("b", (SYSTEM,), "2")],
        [Problem("a1", (), ""), b],
    ]
    assert digest([a, b]) == digest([Problem("a", (), "1", "elsewhere"), b]) and len(digest([])) == 16
    assert len({digest(problems) for problems in [[a, b], *others]}) == 1 + len(others)


def test_mean_rewards_and_weights_tell_system_prompts_apart(tmp_path):
    plain, told = Problem("1+1?", (), "2"), Problem("1+1?", (SYSTEM,), "2")
    table = [
        {"problem": p.key, "reward": r} for p, r in [(plain, 1), (plain, 0.0), (told, 0), (told, 0), (told, 0), (told, 1)]
    ]
    path = write_jsonl(tmp_path / "g.jsonl", table)
    assert dataset.mean_rewards(path, "--x") == {plain.key: 0.5, told.key: 0.25}
    assert dataset.paced_weights(path, [told, plain]) == [0.1875, 0.25]


# ------------------------------------------------------------------------------------------------------------- prompts
PARTS = "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
PARTS += "<|assistant|>"
PARTS_WITH_END = toy.CHAT_TEMPLATE.replace("m['content']", "m['content'][0].text")
PRINTS_PARTS = "{% for m in messages %}{% if m['content'] is string %}{{ m['content'][:2] }}{% else %}{{ m['content'] }}"
PRINTS_PARTS += "{% endif %}{% endfor %}"
STRICT = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
STRICT += "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


def tokenizer_with(template):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_loops_over_content_parts_renders_the_same_prompt():
    problem = Problem("1+2?", (SYSTEM | {"content": "7"},), None)
    expected = render_prompt(toy.make_tokenizer(), problem, "", False)
    assert render_prompt(tokenizer_with(PARTS), problem, "", False) == expected
    assert toy.ID["1"] in expected and toy.ID["7"] in expected


@pytest.mark.parametrize("template", [
    "<|user|><|assistant|>",
    toy.CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper"),
    toy.CHAT_TEMPLATE.replace("m['content']", "m['content'][:3]"),
    PRINTS_PARTS,
    "{% for m in messages %}{{ m['text'] }}{% endfor %}",
])  # fmt: skip
def test_a_prompt_without_its_problem_is_refused(template):
    problem = Problem("so 1+2?", (), None, "--train-data d.jsonl, line 3")
    with pytest.raises(UsageError) as caught:
        render_prompt(tokenizer_with(template), problem, "", False, "--teacher")
    for part in (
        "--teacher ",
        "chat template",
        "--train-data d.jsonl, line 3",
        "leaves out the user's message",
        "chat_template.jinja",
    ):
        assert part in str(caught.value)


def test_a_system_message_that_the_template_drops_is_refused():
    template = (
        "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
    )
    with pytest.raises(
        UsageError, match="leaves out the system's message.*take messages out of the data .here system, user"
    ):
        render_prompt(tokenizer_with(template), Problem("1+2?", (SYSTEM,), None), "", False)
    assert render_prompt(tokenizer_with(template), Problem("1+2?", (), None), "", False)


@pytest.mark.parametrize("template, reason", [
    (STRICT, "System role not supported"),
    ("{% for m in messages %}{{ m['content'] + m['nothing'] + 1 }}{% endfor %}", "nothing"),
    ("{% for m in messages %}{{ m['content'] }}", "Unexpected end of template"),
])  # fmt: skip
def test_a_template_that_fails_is_one_line_with_the_row_and_a_fix(template, reason):
    problem = Problem("1+2?", (SYSTEM,), None, "--train-data d.jsonl, line 3")
    with pytest.raises(UsageError) as caught:
        render_prompt(tokenizer_with(template), problem, "", False, "--student")
    said = str(caught.value)
    assert said.startswith("--student ") and "\n" not in said
    assert all(
        part in said
        for part in ("--train-data d.jsonl, line 3", reason, "take messages out of the data", "chat_template.jinja")
    )


def test_white_space_around_a_problem_may_be_trimmed():
    trimming = tokenizer_with(toy.CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim"))
    assert render_prompt(trimming, Problem(" 1+2?\n", (), None), "", False) == render_prompt(
        trimming, Problem("1+2?", (), None), "", False
    )


def test_a_template_with_the_date_is_a_warning_said_once(capsys):
    prompts.say_once.cache_clear()
    problems = [Problem("1+2?", (), None), Problem("2+2?", (), None)]
    for template, warns in [("{{ strftime_now('%d') }}" + toy.CHAT_TEMPLATE, True), (toy.CHAT_TEMPLATE, False),
                            ("{% if tools %}{{ strftime_now('%d') }}{% endif %}" + toy.CHAT_TEMPLATE, False)]:  # fmt: skip
        for _ in range(2):
            render_all(tokenizer_with(template), problems, "", False, "--teacher")
        out = capsys.readouterr().out
        assert out.count("warning") == warns and (not warns or "--teacher" in out and "chat_template.jinja" in out)


def test_a_problem_that_the_tokenizer_cannot_spell_is_a_warning(capsys):
    prompts.say_once.cache_clear()
    problems = [Problem("1+2?", (), None), Problem("1+ö?", (), None, "--x d.csv, line 2"), Problem("ß", (), None)]
    render_all(toy.make_tokenizer(), problems, "", False)
    assert "its tokenizer cannot spell 2 problems (first: --x d.csv, line 2)" in capsys.readouterr().out


def test_rendered_ids_are_those_of_transformers_own_call():
    tokenizer, problem = toy.make_tokenizer(), Problem("1+2?", (SYSTEM | {"content": "7"},), None)
    messages = [*problem.messages, {"role": "user", "content": "1+2?\n3"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert render_prompt(tokenizer, problem, "3", False) == expected


def test_each_of_two_models_is_named_by_its_flag():
    args = SimpleNamespace(instruction="", max_prompt_tokens=9, student="")
    for broken, flag in [(0, "--student"), (1, "--teacher")]:
        pair = [toy.make_tokenizer(), toy.make_tokenizer()]
        pair[broken].chat_template = "<|user|>"
        with pytest.raises(UsageError, match=f"^{flag} "):
            render_prompts(args, [Problem("1+2?", (), None)], pair, [False, False])


# ------------------------------------------------------------------------------------------------------------- scripts
@pytest.fixture
def broken_template(checkpoints, tmp_path):
    """A checkpoint whose template renders every prompt empty."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints.student, folder)
    tokenizer_with("<|user|><|assistant|>").save_pretrained(folder)
    return folder


SMALL = ["--instruction", "", "--max-response-tokens", "4", "--sampler", "hf"]
STEPS = [*SMALL, "--max-steps", "1", "--prompts-per-step", "2"]


@pytest.mark.parametrize("script", ["grpo", "opd", "opd_teacher", "eval_math"])
def test_every_script_refuses_a_template_that_drops_the_problem(cli, checkpoints, data, tmp_path, broken_template, script):
    bad, good = broken_template, checkpoints.student
    flags = {
        "grpo": ["--model", bad, "--train-data", data, *STEPS, "--minibatch-prompts", 2],
        "opd": ["--student", bad, "--teacher", good, "--train-data", data, *STEPS, "--force"],
        "opd_teacher": ["--student", good, "--teacher", bad, "--train-data", data, *STEPS, "--force"],
        "eval_math": ["--model", bad, "--benchmarks", data, *SMALL],
    }[script]
    code, _, err = cli(script.removesuffix("_teacher"), *flags, "--out", tmp_path / "out")
    flag = {"opd": "--student", "opd_teacher": "--teacher"}.get(script, "--model")
    assert (
        code == 2 and f"error: {flag} {broken_template}: its chat template does not render" in err and "Traceback" not in err
    )


def test_problems_that_differ_in_messages_alone_are_apart_in_every_file(run_script, checkpoints, tmp_path):
    table = [
        {"prompt": [{"role": "system", "content": s}, {"role": "user", "content": "1+2?"}], "answer": "3"} for s in "12"
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [*table, {"prompt": "1+2?", "answer": "3"}])
    keys = {p.key for p in load(path)}
    shared = {"train_data": path, "max_response_tokens": 4, "max_steps": 1}
    rl = run_script(
        "grpo", model=checkpoints.student, prompts_per_step=3, minibatch_prompts=3, group_size=2, label_split=path, **shared
    )
    assert set(json.loads((rl.out / "labels.json").read_text())) == keys and rl.record["labels_used"] == 3
    models = {"teacher": checkpoints.wide, "student": checkpoints.student}
    warm = run_script("fkl_warmup", rollouts_per_step=3, **models, **shared)
    assert {row["problem"] for row in load_rows(str(warm.out / "rollouts.jsonl"), "--x")} == keys
    again = run_script("fkl_warmup", rollouts_per_step=3, rollouts=str(warm.out / "rollouts.jsonl"), **models, **shared)
    assert again.metrics[0]["losses/forward_kl"] == warm.metrics[0]["losses/forward_kl"]
    measured = run_script("eval_math", model=checkpoints.student, benchmarks=(path,), samples=2, max_response_tokens=4)
    rewards = dataset.mean_rewards(str(measured.out / "d" / "generations.jsonl"), "--x")
    assert rewards.keys() == keys


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("infra/*.py")]), ids=lambda path: path.name)
def test_no_source_opens_a_text_file_in_the_locales_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = [w.value for w in (*node.args, *(k.value for k in node.keywords)) if isinstance(w, ast.Constant)]
        if name not in ("open", "read_text", "write_text", "fdopen") or "rb" in words or "wb" in words:
            continue
        target = ast.unparse(node)
        harmless = any(part in target for part in ("/proc/", "os.devnull, ", "os.open", "os.dup"))
        assert harmless or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}: {target}"


def test_rows_know_no_other_kind_than_the_help_says():
    assert "/".join(rows.READERS) in (ROOT / "common.py").read_text(encoding="utf-8")


def test_opd_trains_the_same_with_a_template_that_loops_over_content_parts(cli, checkpoints, data, tmp_path):
    losses = []
    for template in (toy.CHAT_TEMPLATE, PARTS_WITH_END):
        models = {}
        for role in ("student", "wide"):
            models[role] = shutil.copytree(getattr(checkpoints, role), tmp_path / f"{role}{len(losses)}")
            tokenizer_with(template).save_pretrained(models[role])
        flags = ["--student", models["student"], "--teacher", models["wide"], "--train-data", data, "--out"]
        code, out, err = cli("opd", *flags, tmp_path / f"out{len(losses)}", *STEPS)
        assert code == 0, err
        losses.append(load_rows(str(tmp_path / f"out{len(losses)}/metrics.jsonl"), "--x")[0]["losses/reverse_kl"])
    assert losses[0] == losses[1]
