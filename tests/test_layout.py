"""The layout of the package: imports go down only, no circle, small functions, every file named where one looks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pi_gguf"

# The flow of data. A module imports from its own package and from those to the left.
ORDER = [
    "errors", "common", "bundled", "texts", "scaling", "families", "checkpoint", "adapters", "vocabulary", "gguf",
    "llamacpp", "restore", "measure", "documents", "runtime",
    "engine", "models", "data", "tune", "write", "evaluate", "prove", "pipeline",
    "server", "cli", "__init__", "__main__",
]  # fmt: skip

HEAVY = {"torch", "transformers", "llama_cpp"}
# These load one of the three, or take half a second and more themselves
LOADS_HEAVY = {
    "peft", "accelerate", "lm_eval", "datasets", "matplotlib", "pyarrow", "rouge_score", "bitsandbytes",
    "huggingface_hub",
}  # fmt: skip

MADE_OF_OTHERS = {"tune.callbacks", "tune.head", "evaluate.harness"}
"""Modules whose classes are derived from those of a heavy library; they are imported when that is needed anyway."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name within it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of the package that an import statement loads."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pi_gguf":
        of = (node.module or "").removeprefix("pi_gguf").removeprefix(".")
        for alias in node.names:
            whole = f"{of}.{alias.name}".removeprefix(".")
            yield whole if whole in modules() else of or "__init__"
    elif isinstance(node, ast.Import):
        yield from (a.name.removeprefix("pi_gguf.") for a in node.names if a.name.startswith("pi_gguf."))


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_its_place():
    assert sorted({package_of(name) for name in modules()}) == sorted(ORDER)


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    for node in ast.walk(modules()[name]):
        for other in imported(node):
            assert ORDER.index(package_of(other)) <= ORDER.index(package_of(name)), f"{name} imports {other}"


def test_no_circle():
    graph = {name: {o for node in ast.walk(tree) for o in imported(node)} for name, tree in modules().items()}
    left = {name: others - {name} for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_a_private_name_stays_in_its_module():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pi_gguf"):
                assert not [a.name for a in node.names if re.match(r"_[^_]", a.name)], f"{name} imports {node.module}"


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    doc = ast.get_docstring(function, clean=False) is not None
    assert function.end_lineno and first.end_lineno
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if doc else 0)


def test_functions_are_small():
    long = {
        f"{name}.{f.name}": code_lines(f) for name, tree in modules().items() for f in functions(tree)
        if code_lines(f) > 60
    }  # fmt: skip
    assert long == {}


def test_signatures_are_short():
    """Eight parameters at most; functions that the command line is made of, and the whole of dataclasses, have more."""
    public = {node.value for node in ast.walk(modules()["__init__"]) if isinstance(node, ast.Constant)} | {
        "demo",
        "run",
    }
    of_open = "runtime.model.__init__"  # the keywords of `pi_gguf.open`
    wide = {}
    for name, tree in modules().items():
        for f in functions(tree):
            every = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            count = len([a for a in every if a.arg not in ("self", "cls")])
            if count > 8 and f.name not in public and f"{name}.{f.name}" != of_open:
                wide[f"{name}.{f.name}"] = count
    assert wide == {}


@pytest.mark.parametrize("package", [p.parent.name for p in sorted(PACKAGE.glob("*/__init__.py"))])
def test_a_package_names_its_files(package):
    text = ast.get_docstring(modules()[package]) or ""
    named = re.findall(r"^(\w+): \S", text, re.MULTILINE)
    there = [p.stem for p in (PACKAGE / package).glob("*.py") if p.stem != "__init__"]
    assert sorted(named) == sorted(there)
    lines = sum(len(p.read_text().splitlines()) for p in (PACKAGE / package).glob("*.py"))
    assert lines < 3000


def outside(node: ast.AST) -> Iterator[str]:
    """The libraries that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names if package_of(alias.name) != "pi_gguf")
    elif isinstance(node, ast.ImportFrom) and node.module and package_of(node.module) != "pi_gguf":
        yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("click", {"cli.app", "cli.ask", "cli.building", "cli.run", "cli.serve"}),
        ("llama_cpp", {"llamacpp.library", "common.private"}),
        ("gguf", {"gguf.file"}),
        ("peft", {"tune.lora"}),
        ("datasets", {"texts"}),
        ("pyarrow", {"texts"}),
        ("lm_eval", {"evaluate.short", "evaluate.harness"}),
    ],
)
def test_each_library_has_few_doors(library, doors):
    found = {name for name, tree in modules().items() for node in ast.walk(tree) if library in set(outside(node))}
    assert found == doors


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: no functions, nothing for type checkers alone."""
    for node in tree.body:
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node


@cache
def loads(name: str) -> frozenset[str]:
    """The libraries that importing a module loads, by itself or by what it imports."""
    found: set[str] = set()
    for node in at_import(modules()[name]):
        found |= set(outside(node))
        for other in imported(node):
            found |= loads(other) if other != name else set()
    return frozenset(found)


def test_importing_a_module_loads_nothing_heavy():
    assert {name for name in modules() if loads(name) & (HEAVY | LOADS_HEAVY)} == MADE_OF_OTHERS


def test_imports_in_functions_have_a_reason():
    """Imports stand at the top, but where a module would then load what takes seconds."""
    without_reason = []
    for name, tree in modules().items():
        for function in functions(tree):
            for node in ast.walk(function):
                heavy = set(outside(node)) & (HEAVY | LOADS_HEAVY) or set(imported(node)) & MADE_OF_OTHERS
                if isinstance(node, ast.Import | ast.ImportFrom) and not heavy:
                    without_reason.append(f"{name}:{node.lineno}")
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert len(set(without_reason)) < 3 * lines / 1000, sorted(set(without_reason))
