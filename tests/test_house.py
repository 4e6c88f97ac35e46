"""The layout: which files there are, who may import whom, and how much of a script a reader has to hold in mind."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT
from files import tracked

SCRIPTS = {"grpo", "fkl_warmup", "opd", "bridge", "eval_math", "toy"}
MAY_IMPORT = {  # of this repository; what stands in a test may import everything
    **{script: {"common", "infra", "kernels"} for script in SCRIPTS},
    "variants": {"common", "infra", "kernels"},
    "common": {"infra", "kernels"},
    "infra": {"infra", "kernels"},
    "kernels": {"kernels"},
}
FOLDERS = ("", "variants/", "infra/", "kernels/")
FILES = [ROOT / path for folder in FOLDERS for path in tracked(f"{folder}*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(source: str) -> set[str]:
    """Dotted names that a module imports, at its top or within a function; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str) -> str | None:
    """The module of this repository that holds a dotted name: the longest beginning of it that is one."""
    parts = name.split(".")
    beginnings = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in MODULES), None)


GRAPH = {name: {module_of(one) for one in imports(path.read_text())} - {None} for name, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle, the first again at the end; None if there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name) :] + [name]
        if name in done:
            return None
        found = next(filter(None, (visit(other, [*path, name]) for other in sorted(graph[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_the_top_level_has_the_scripts_and_what_they_share():
    assert {Path(path).stem for path in tracked("*.py")} == SCRIPTS | {"common"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_from_the_scripts_to_the_kernels(name):
    """scripts and variants -> common -> infra -> kernels: a script never imports another."""
    wrong = {other for other in GRAPH[name] if other.split(".")[0] not in MAY_IMPORT[name.split(".")[0]]}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_no_module_imports_itself_by_way_of_others():
    """An import within a function counts: it only hides the circle from Python."""
    assert circle(GRAPH) is None, " -> ".join(circle(GRAPH))


def test_circles_and_hidden_imports_are_found():
    """The checks above can fail."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert imports("def f():\n    from infra import cli, hub\n    import opd") == {"infra.cli", "infra.hub", "opd"}
    assert module_of("infra.cli.require") == module_of("infra.cli") == "infra.cli" and module_of("torch.nn") is None
    assert {"common", "infra.meter", "kernels"} <= GRAPH["grpo"] and "infra.sampler_vllm" in GRAPH["common"]


@pytest.mark.parametrize("script", ["grpo", "fkl_warmup", "opd"])
def test_an_algorithm_is_read_in_one_sitting(script):
    lines = MODULES[script].read_text().splitlines()
    [main] = [k for k, line in enumerate(lines) if line.startswith("def main(")]
    loop = next(k for k, line in enumerate(lines) if k > main and re.match(r" +(for|while) step\b", line))
    end = max(k for k, line in enumerate(lines) if "run.checkpoint(" in line)
    assert len(lines) <= 300
    assert loop - main <= 60, f"{script}'s set-up has {loop - main} lines"
    assert end - loop + 1 <= 120, f"{script}'s loop has {end - loop + 1} lines"


def test_common_stays_short():
    assert len(MODULES["common"].read_text().splitlines()) <= 220
