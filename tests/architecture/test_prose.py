"""Docstrings open with a verb or a noun of the field; files and functions stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "align"
LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 60

# an opening without its noun: the reader learns only later what is spoken of
OPENING = re.compile(
    r"(of|what|where|that|whether|which|how|why|who|whose|those|its|it|they|none of|the same|"
    r"in which|on which|for which|by which|beside|something|somebody|everything|nothing)\b",
    re.IGNORECASE,
)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of modules, classes, functions, fields and constants."""
    for node in ast.walk(tree):
        body = getattr(node, "body", ())
        for child in body if isinstance(body, list) else ():
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value.strip()


def badly_opened(source: str) -> list[str]:
    return [text for text in docstrings(ast.parse(source)) if OPENING.match(text)]


def long_parts(source: str, name: str) -> dict[str, int]:
    """Lines of a file and of its functions, of those that are over the limit."""
    found = {name: len(source.splitlines())} if len(source.splitlines()) > LINES_OF_A_FILE else {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                found[f"{name}::{node.name}"] = lines
    return found


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    found = [
        f"{name}: {text.splitlines()[0]}"
        for name, source in sources().items()
        for text in badly_opened(source)
    ]
    assert found == []


def test_files_and_functions_are_short() -> None:
    found: dict[str, int] = {}
    for name, source in sources().items():
        found |= long_parts(source, name)
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "Of each model its score.",
        "What a run has.",
        "The same, packed.",
        "Whether it fits.",
        "that",
    ],
)
def test_the_gate_rejects_an_opening(text: str) -> None:
    assert badly_opened(f'def f():\n    """{text}"""\n') == [text]
    assert badly_opened(f'LIMIT = 3\n"""{text}"""\n') == [text]


def test_the_gate_lets_pass() -> None:
    assert badly_opened('"""Offset of a row. What it is."""\nx = "What"\n') == []


def test_the_gate_rejects_length() -> None:
    body = "    pass\n" * (LINES_OF_A_FUNCTION - 1)
    assert long_parts(f"def f():\n{body}", "a.py") == {}
    assert long_parts(f"def f():\n{body}    pass\n", "a.py") == {"a.py::f": LINES_OF_A_FUNCTION + 1}
    assert long_parts("x = 1\n" * (LINES_OF_A_FILE + 1), "a.py") == {"a.py": LINES_OF_A_FILE + 1}
