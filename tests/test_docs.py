"""The docs say what the code does. Everything is read from the source with ast: nothing is imported, nothing runs."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
SOURCES = sorted(str(p.relative_to(ROOT)) for folder in ("", "kernels/", "benchmarks/") for p in ROOT.glob(f"{folder}*.py"))
METRIC = re.compile(r"(charts|losses|debug|time|eval)/")
REQUIRED, COMPUTED = object(), object()  # a field without a default, and one whose default is an expression


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text()


@cache
def nodes(script: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(read(script))))


def literal(node):
    """Value of a default: a literal, or a constant of a module such as dataset.INSTRUCTION."""
    if isinstance(node, ast.Attribute) and (ROOT / f"{ast.unparse(node.value)}.py").exists():
        return next(ast.literal_eval(n.value) for n in nodes(f"{ast.unparse(node.value)}.py") if is_assignment(n, node.attr))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED


def is_assignment(node, target: str) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [target]


@cache
def fields(script: str) -> dict[str, tuple]:
    """{"--flag-name": (default, annotation)} of a script's Args; {} without one."""
    body = [n for c in nodes(script) if isinstance(c, ast.ClassDef) and c.name == "Args" for n in c.body]
    return {
        "--" + n.target.id.replace("_", "-"): (literal(n.value) if n.value else REQUIRED, ast.unparse(n.annotation))
        for n in body
        if isinstance(n, ast.AnnAssign)
    }


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
    """Strings that begin like a metric; the beginning of an f-string is one too, and documented nowhere."""
    return {n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str) and METRIC.match(n.value)}


def table(page: str, header: str) -> list[list[str]]:
    """Rows of the page's tables whose first column is called `header`, cells stripped."""
    rows, inside = [], False
    for line in read(page).splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            inside = False
        elif inside and not set(line) <= set("|-"):
            rows.append(cells)
        inside = inside or cells[:1] == [header]
    return rows


def documented(page: str, header: str) -> list[str]:
    return [row[0].strip("`") for row in table(page, header)]


def page_of(script: str) -> str:
    return f"docs/{Path(script).stem}.md"


def fences(text: str):
    """(language and what follows it, contents) of every fenced block."""
    return re.findall(r"^```(.*)\n([\s\S]*?)^```$", text, re.MULTILINE)


def commands(path: str) -> list[list[str]]:
    """Every `python FILE.py ...` of a page's bash blocks and code spans, or of a script's docstring, as a list of words."""
    text = read(path)
    if path.endswith(".py"):
        docstring = ast.get_docstring(ast.parse(text)) or ""
        lines = re.findall(r"^ {4}(python \S.*?)(?: {3,}.*)?$", docstring, re.MULTILINE)  # an explanation may follow
    else:
        blocks = [block for kind, block in fences(text) if kind == "bash"]
        prose = re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`(python [^`]*)`", prose)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts if part.startswith("python ")]
    return [w[1:] for w in words if w[1].endswith(".py")]


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------------- tables and the code
@pytest.mark.parametrize("script", [s for s in SOURCES if "run_folder.Run(" in read(s)])
def test_every_logged_metric_is_in_the_table_and_the_other_way_round(script):
    logged = metrics(nodes(script))
    if "common.evaluate(" in read(script):
        logged |= metrics(function("common.py", "evaluate"))
    page = documented(page_of(script), "metric")
    assert len(page) == len(set(page))
    assert set(page) - logged == set(), "documented, but never logged"
    assert logged - set(page) == set(), "logged, but not documented"
    assert all(all(row) and len(row) == 3 for row in table(page_of(script), "metric")), "a cell is empty or missing"


@pytest.mark.parametrize("script", [s for s in SOURCES if "/" not in s and fields(s)])
def test_options_table_is_args(script):
    rows = {row[0].strip("`"): row for row in table(page_of(script), "flag")}
    assert list(rows) == list(fields(script)), "flags that differ, or another order"
    for flag, (default, _) in fields(script).items():
        _, cell, meaning = rows[flag]
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


@pytest.mark.parametrize(
    "page, header, keys",
    [
        ("docs/eval_math.md", "key", lambda: dict_keys(function("eval_math.py", "main"), "summary")),
        ("docs/common.md", "key of `run.json`", lambda: dict_keys(nodes("run_folder.py"), "self.record")),
        ("docs/report.md", "field", lambda: dict_keys(function("report.py", "write"), "record")),
        (
            "docs/report.md",
            "field of an arm or stage",
            lambda: (
                dict_keys(function("report.py", "measured"), "return")
                + ["benchmarks"]
                + dict_keys(function("report.py", "cost"), "total")
            ),
        ),
        ("docs/report.md", "comparison", lambda: dict_keys(nodes("report.py"), "COMPARISONS")),
        ("docs/toy.md", "key", lambda: dict_keys(function("toy.py", "measure"), "return")),
        ("docs/telemetry.md", "key of `samples.jsonl`", lambda: dict_keys(function("samples_page.py", "write"), "row")),
        (
            "docs/preflight.md",
            "figure in `run.json`",
            lambda: dict_keys(function("preflight.py", "check_models"), "figures"),
        ),
    ],
)
def test_keys_of_result_files(page, header, keys):
    assert documented(page, header) == keys()


def test_bridge_names_its_stages_arms_and_benchmarks():
    assert documented("docs/bridge.md", "stage") == dict_keys(function("bridge.py", "stages_of"), "return")
    assert documented("docs/bridge.md", "arm") == dict_keys(nodes("bridge.py"), "ARMS")
    assert documented("docs/eval_math.md", "benchmark")[:-1] == dict_keys(nodes("eval_math.py"), "HUB")


# ------------------------------------------------------------------------------------------------------- quoted code
@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_in_the_script(page):
    """A python block quotes lines of the page's script, or of the file named behind the word python. Pages that describe no
    script of their own (README.md, kernels.md) may show other code."""
    for kind, block in fences(read(page)):
        language, _, source = kind.partition(" ")
        assert language in ("bash", "python", "json", "text"), f"a block without a language: {block[:60]}"
        own = f"{Path(page).stem}.py"
        if language == "python" and (source or (ROOT / own).exists()):
            source = source or own
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
        known, given = fields(script), {}
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
