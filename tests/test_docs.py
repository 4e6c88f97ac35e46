"""The docs say what the code does. Everything is read from the source with ast: nothing is imported, nothing runs."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from files import tracked

import bridge

ROOT = Path(__file__).parent.parent


PAGES = ["README.md", "recipes/README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
SCRIPTS = ["grpo.py", "fkl_warmup.py", "opd.py", "bridge.py", "eval_math.py", "toy.py", "infra/report.py"]  # a page each
VARIANTS = tracked("variants/*.py")  # with a section each in docs/variants.md
SOURCES = [f for folder in ("", "infra/", "kernels/", "benchmarks/", "variants/") for f in tracked(f"{folder}*.py")]
SHARED = {"common.RunArgs": "RunArgs", "common.RolloutArgs": "RolloutArgs"}  # documented in docs/flags.md
METRIC = re.compile(r"(charts|losses|debug|time|eval)/")
REQUIRED, COMPUTED = object(), object()  # a field without a default, and one whose default is an expression


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text()


@cache
def nodes(script: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(read(script))))


def literal(node, script: str):
    """Value of a default: a literal, or a constant that the script takes from a module of infra."""
    if isinstance(node, ast.Attribute):  # dataset.INSTRUCTION
        module, name = f"infra/{ast.unparse(node.value)}.py", node.attr
    else:  # INSTRUCTION
        name = node.id if isinstance(node, ast.Name) else None
        imports = [n for n in nodes(script) if isinstance(n, ast.ImportFrom) and name in [alias.name for alias in n.names]]
        module = f"{imports[0].module.replace('.', '/')}.py" if imports else ""
    if module and (ROOT / module).exists():
        node = next(n.value for n in nodes(module) if is_assignment(n, name))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED


def is_assignment(node, target: str) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [target]


def class_named(script: str, name: str) -> ast.ClassDef | None:
    return next((n for n in nodes(script) if isinstance(n, ast.ClassDef) and n.name == name), None)


@cache
def fields(script: str, name: str = "Args") -> dict[str, tuple]:
    """{"--flag-name": (default, annotation)} of the class's own fields; {} without such a class."""
    found = class_named(script, name)
    return {
        "--" + n.target.id.replace("_", "-"): (literal(n.value, script) if n.value else REQUIRED, ast.unparse(n.annotation))
        for n in (found.body if found else [])
        if isinstance(n, ast.AnnAssign)
    }


@cache
def help_of(script: str, name: str = "Args") -> dict[str, str]:
    """{"--flag-name": the string below the field} of the class's own fields."""
    found = class_named(script, name).body
    return {
        "--" + field.target.id.replace("_", "-"): text.value.value
        for field, text in zip(found, found[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
    }


def all_fields(script: str) -> dict[str, tuple]:
    """Its own fields and the shared ones that it inherits."""
    found = class_named(script, "Args")
    shared = [fields("common.py", SHARED[ast.unparse(base)]) for base in (found.bases if found else [])]
    return {flag: field for one in [*shared, fields(script)] for flag, field in one.items()}


def dict_keys(tree: list[ast.AST], target: str) -> list[str]:
    """Keys of the dict literals that are assigned to `target` with = or |=, or, for "return", returned."""
    found = []
    for n in tree:
        assigned = is_assignment(n, target) or isinstance(n, ast.AugAssign) and ast.unparse(n.target) == target
        if (assigned or target == "return" and isinstance(n, ast.Return)) and isinstance(n.value, ast.Dict):
            found += [key.value for key in n.value.keys if key is not None]
    assert found, f"no dict literal is assigned to {target}"
    return list(dict.fromkeys(found))


def function(script: str, name: str) -> list[ast.AST]:
    return next(list(ast.walk(n)) for n in nodes(script) if isinstance(n, ast.FunctionDef) and n.name == name)


def metrics(tree: list[ast.AST]) -> set[str]:
    """Strings that are a metric's name; the beginning of an f-string is none."""
    parts = {id(part) for n in tree if isinstance(n, ast.JoinedStr) for part in n.values}
    strings = {n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in parts}
    return {text for text in strings if METRIC.match(text)}


def calls(script: str, function: str) -> list[ast.Call]:
    return [n for n in nodes(script) if isinstance(n, ast.Call) and ast.unparse(n.func) == function]


def words(function: ast.FunctionDef, call: ast.Call) -> dict[str, list[str]]:
    """{name: the strings it takes within the function}: of a parameter the call's, of a loop over a tuple the tuple's."""
    found = {p.arg: [a.value] for p, a in zip(function.args.args, call.args, strict=False) if isinstance(a, ast.Constant)}
    for loop in (n for n in ast.walk(function) if isinstance(n, ast.For)):
        names, rows = loop.target, loop.iter
        if isinstance(rows, ast.Call) and ast.unparse(rows.func) == "enumerate":
            names, rows = names.elts[1], rows.args[0]
        rows = rows.elts if isinstance(rows, ast.Tuple) else []
        if isinstance(names, ast.Tuple):
            names, rows = names.elts[0], [row.elts[0] for row in rows]
        found[names.id] = [row.value for row in rows if isinstance(row, ast.Constant)]
    return found


def entered(name: str, call: ast.Call) -> set[str]:
    """Metrics that a call of a function of infra/telemetry.py enters."""
    tree = function("infra/telemetry.py", name)
    found = metrics(tree)
    for text in (n for n in tree if isinstance(n, ast.JoinedStr) and METRIC.match(str(getattr(n.values[0], "value", "")))):
        names = [""]
        for part in text.values:
            values = [part.value] if isinstance(part, ast.Constant) else words(tree[0], call)[ast.unparse(part.value)]
            names = [name + value for name in names for value in values]
        found |= set(names)
    return found


def logged(script: str) -> set[str]:
    """Every metric that a training script writes: those it names, telemetry.py's, common.evaluate's, and its laps."""
    found = metrics(nodes(script))
    for name in {n.name for n in nodes("infra/telemetry.py") if isinstance(n, ast.FunctionDef)}:
        found |= {metric for call in calls(script, f"telemetry.{name}") for metric in entered(name, call)}
    if calls(script, "common.evaluate"):
        found |= metrics(function("common.py", "evaluate"))
    laps = {f"time/{call.args[0].value}" for call in calls(script, "meter.lap")}
    return found | laps | ({"time/step"} if laps else set())


def section(page: str, name: str) -> str:
    """What stands under the heading that names a file."""
    parts = re.split(r"^## (.*)$", read(page), flags=re.MULTILINE)
    found = [text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if name in heading]
    assert len(found) == 1, f"{page}: {len(found)} headings name {name}"
    return found[0]


def table(text: str, header: str) -> list[list[str]]:
    """Rows of the tables whose first column is called `header`, cells stripped."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            inside = False
        elif inside and not set(line) <= set("|-"):
            rows.append(cells)
        inside = inside or cells[:1] == [header]
    return rows


def documented(page: str, header: str) -> list[str]:
    return [row[0].strip("`") for row in table(read(page), header)]


def page_of(script: str) -> str:
    return f"docs/{Path(script).stem}.md"


def fences(text: str):
    """(language and what follows it, contents) of every fenced block."""
    return re.findall(r"^```(.*)\n([\s\S]*?)^```$", text, re.MULTILINE)


def commands(path: str) -> list[list[str]]:
    """[script, words of its command line] of every command of `launched`."""
    return [command for _, command in launched(path)]


def launched(path: str) -> list[tuple[list[str], list[str]]]:
    """(what starts it, [script, words of its command line]) of every `python FILE.py`, `python -m infra.MODULE` and
    `torchrun ... FILE.py` in a page's bash blocks (the first two also in code spans) or a docstring. my_opd.py is a reader's
    copy of opd.py."""
    text = read(path)
    if path.endswith(".py"):
        docstring = ast.get_docstring(ast.parse(text)) or ""
        command = r"^ {4}((?:python|torchrun) \S.*?)(?: {3,}.*)?$"  # an explanation may follow
        lines = re.findall(command, docstring, re.MULTILINE)
    else:
        blocks = [block for kind, block in fences(text) if kind == "bash"]
        prose = re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`(python [^`]*)`", prose)
    found = []
    for part in [part.strip() for line in lines for part in line.split("&&")]:
        words = shlex.split(part, comments=True) if part.startswith(("python ", "torchrun ")) else []
        if words[1:2] == ["-m"] and words[2].startswith("infra."):
            words = ["python", f"{words[2].replace('.', '/')}.py", *words[3:]]
        place = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        if place and (words[0] == "torchrun" or place == 1):
            found.append((words[:place], [re.sub(r"\bmy_", "", words[place]), *words[place + 1 :]]))
    return found


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------------- tables and the code
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-?\d+)?")


def check_flags(rows: list[list[str]], expected: dict[str, tuple], help_texts: dict[str, str]) -> None:
    assert [row[0].strip("`") for row in rows] == list(expected), "flags that differ, or another order"
    for (_, cell, meaning), (flag, (default, _)) in zip(rows, expected.items(), strict=True):
        assert default is not COMPUTED, f"{flag}: a default that this test cannot read"
        if default is REQUIRED or default is None or isinstance(default, bool):
            shown = {None: "none", True: "on", False: "off"}.get(default, "required")
            assert cell == shown, f"{flag}: {cell}, should be {shown}"
        elif isinstance(default, int | float):
            assert type(default)(cell.strip("`")) == default, f"{flag}: {cell}, is {default}"
        else:
            shown = default if isinstance(default, str) else " ".join(default)
            assert cell == (f"`{shown}`" if shown else '`""`'), f"{flag}: {cell}, is {shown!r}"
        assert meaning, f"{flag}: no meaning"
        missing = set(NUMBER.findall(help_texts[flag])) - set(NUMBER.findall(meaning))
        assert not missing, f"{flag}: the meaning lacks {missing} of --help"


def base_of(variant: str) -> str:
    """The script that a variant is a copy of: variants/opd_topk.py of opd.py."""
    first = Path(variant).stem.split("_")[0]
    return next(script for script in SCRIPTS if script.startswith(first))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_s_own_flags_are_in_the_table_of_its_page(script):
    check_flags(table(read(page_of(script)), "flag"), fields(script), help_of(script))


def test_shared_flags_are_in_the_tables_of_flags_md():
    expected, help_texts = [one("common.py", "RunArgs") | one("common.py", "RolloutArgs") for one in (fields, help_of)]
    check_flags(table(read("docs/flags.md"), "flag"), expected, help_texts)


def test_the_canary_s_tolerances_are_those_of_the_sampler():
    [values] = [n.value.values for n in nodes("infra/sampler_vllm.py") if is_assignment(n, "CANARY_TOLERANCE")]
    tolerances = [ast.literal_eval(value) for value in values]  # float32, bfloat16
    [row] = [row for row in table(read("docs/samplers.md"), "`debug/canary_logprob_diff`") if "default" in row[0]]
    assert [float(cell) for cell in row[1:]] == tolerances
    said = NUMBER.findall(help_of("common.py", "RolloutArgs")["--canary-tolerance"])
    assert [float(number) for number in said][:2] == tolerances


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_section_has_the_flags_that_its_script_has_not(variant):
    base = fields(base_of(variant))
    own = {flag: field for flag, field in fields(variant).items() if base.get(flag) != field}
    check_flags(table(section("docs/variants.md", Path(variant).name), "flag"), own, help_of(variant))


def check_metrics(rows: list[list[str]], expected: set[str]) -> None:
    page = [row[0].strip("`") for row in rows]
    assert len(page) == len(set(page))
    assert set(page) - expected == set(), "documented, but never logged"
    assert expected - set(page) == set(), "logged, but not documented"
    assert all(all(row) and len(row) == 3 for row in rows), "a cell is empty or missing"


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "run_folder.Run(" in read(s)])
def test_every_logged_metric_is_in_the_table_and_the_other_way_round(script):
    check_metrics(table(read(page_of(script)), "metric"), logged(script))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_section_has_the_metrics_that_its_script_has_not(variant):
    rows = table(section("docs/variants.md", Path(variant).name), "metric")
    check_metrics(rows, logged(variant) - logged(base_of(variant)))


def test_metrics_of_telemetry_are_read_as_they_come_out():
    assert {"losses/reverse_kl_early", "debug/topk_overlap", "debug/topk_overlap_mass"} <= logged("opd.py")
    assert {"losses/forward_kl_late", "time/score", "time/step", "eval/accuracy"} <= logged("fkl_warmup.py")
    assert "losses/reverse_kl_early" not in logged("fkl_warmup.py") | logged("grpo.py")


def summary_keys() -> list[str]:
    """In the order of summary.json."""
    own = dict_keys(function("eval_math.py", "measure"), "summary")
    graded = [key.value for node in function("eval_math.py", "grade") if isinstance(node, ast.Dict) for key in node.keys]
    at = own.index("kept_problems")
    record = dict_keys(nodes("infra/evaluation.py"), "self.record")
    return dict_keys(function("eval_math.py", "figures"), "return") + own[:at] + graded + own[at:] + record


@pytest.mark.parametrize(
    "page, header, keys",
    [
        ("docs/eval_math.md", "key", summary_keys),
        ("docs/run_folder.md", "key of `run.json`", lambda: dict_keys(nodes("infra/run_folder.py"), "self.record")),
        ("docs/report.md", "field", lambda: dict_keys(function("infra/report.py", "write"), "record")),
        (
            "docs/report.md",
            "field of an arm or stage",
            lambda: (
                dict_keys(function("infra/report.py", "measured"), "return")
                + ["benchmarks"]
                + dict_keys(function("infra/report.py", "cost"), "total")
            ),
        ),
        (
            "docs/report.md",
            "field of a study with label budgets",
            lambda: dict_keys(function("infra/frontier.py", "frontier"), "return"),
        ),
        ("docs/pilot.md", "field", lambda: [*dict_keys(function("infra/pilot.py", "read"), "record"), "doubts"]),
        ("docs/report.md", "comparison", lambda: dict_keys(nodes("infra/report.py"), "COMPARISONS")),
        ("docs/toy.md", "key", lambda: dict_keys(function("toy.py", "measure"), "return")),
        (
            "docs/telemetry.md",
            "key of `samples.jsonl`",
            lambda: dict_keys(function("infra/samples_page.py", "write"), "row"),
        ),
        (
            "docs/preflight.md",
            "figure in `run.json`",
            lambda: dict_keys(function("infra/preflight.py", "check_models"), "figures"),
        ),
    ],
)
def test_keys_of_result_files(page, header, keys):
    assert documented(page, header) == keys()


def test_architecture_names_every_module():
    modules = [f for f in tracked("infra/*.py") if not f.endswith("__init__.py")]
    assert sorted(documented("docs/architecture.md", "module")) == sorted(["common.py", *modules, "kernels/"])


def test_bridge_names_its_stages_arms_and_benchmarks():
    assert documented("docs/bridge.md", "stage") == dict_keys(nodes("bridge.py"), "STAGES")
    assert documented("docs/bridge.md", "arm") == list(bridge.ARMS)
    assert documented("docs/eval_math.md", "benchmark")[:-1] == dict_keys(nodes("infra/dataset.py"), "BENCHMARKS")


# ------------------------------------------------------------------------------------------------------- quoted code
@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_in_the_script(page):
    """A python block quotes lines of the page's own file, or of the one named behind the word python. Pages without a file
    of their own (README.md, architecture.md, kernels.md) may show other code."""
    own = next((f for f in (f"{Path(page).stem}.py", f"infra/{Path(page).stem}.py") if (ROOT / f).exists()), None)
    for kind, block in fences(read(page)):
        language, _, source = kind.partition(" ")
        assert language in ("bash", "python", "json", "text"), f"a block without a language: {block[:60]}"
        source = source or own
        if language == "python" and source:
            lines = {line.strip() for line in read(source).splitlines()}
            missing = [line for line in block.splitlines() if line.strip() and line.strip() not in lines]
            assert not missing, f"not in {source}"


# ------------------------------------------------------------------------------------------------ pointers and links
@pytest.mark.parametrize("source", [s for s in SOURCES if not s.endswith("__init__.py")])
def test_first_line_points_to_a_page(source):
    match = re.fullmatch(r"# (?:docs: )?(docs/\w+\.md)", read(source).splitlines()[0])
    assert match, "the first line should be `# docs/PAGE.md`"
    assert (ROOT / match[1]).exists(), f"{match[1]} does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    prose = re.sub(r"^```[\s\S]*?^```$", "", read(page), flags=re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            headings = [slug(line.lstrip("#")) for line in target.read_text().splitlines() if re.match("#+ ", line)]
            assert anchor in headings, f"{link}: no such heading"


# ---------------------------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("path", [*PAGES, *SOURCES])
def test_commands_would_parse(path):
    for script, *words in commands(path):
        assert (ROOT / script).exists(), f"python {script}: no such script"
        known, given = all_fields(script), {}
        if not known:
            continue
        while words:  # as tyro reads them: a value never begins with two dashes unless it stands behind an =
            flag, _, value = words.pop(0).partition("=")
            off = flag.replace("--no-", "--", 1)  # --no-std-normalization
            flag = off if known.get(off, ("", ""))[1] == "bool" else flag
            assert flag in known, f"python {script}: unknown {flag}"
            given[flag] = [value] if value else []
            while words and not words[0].startswith("--"):
                given[flag].append(words.pop(0))
            annotation, count = known[flag][1], len(given[flag])
            expected = 0 if annotation == "bool" else annotation.count("str") if "tuple[str, str]" in annotation else 1
            assert count >= 1 if "..." in annotation else count == expected, f"python {script}: {flag} with {count} values"
            if annotation.startswith("Literal"):
                choices = ast.literal_eval(annotation.removeprefix("Literal"))
                assert set(given[flag]) <= set(choices), f"python {script}: {flag} {given[flag]}"
        missing = [flag for flag, (default, _) in known.items() if default is REQUIRED and flag not in given]
        assert not missing, f"python {script}: lacks {missing}"
