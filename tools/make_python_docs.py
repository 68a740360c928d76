"""The lists of docs/python.md: every public name with its signature and its docstring's first line.

    python tools/make_python_docs.py

Public is what `__all__` of `align`, `align.losses`, `align.data` and `align.evaluation` names. A
test fails when the page is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
sys.path.insert(0, str(PAGE.parents[1]))
PACKAGES = ("align", "align.losses", "align.data", "align.evaluation")


def render(page: str) -> str:
    """The page with every list between its two marks made anew."""
    for package in PACKAGES:
        marks = [f"<!-- {package}: made by tools/make_python_docs.py -->\n", f"<!-- /{package} -->"]
        before, rest = page.split(marks[0])
        _, after = rest.split(marks[1])
        page = before + marks[0] + listing(package) + marks[1] + after
    return page


def listing(package: str) -> str:
    """One line for each public name."""
    module = importlib.import_module(package)
    return "".join(f"- {entry(name, getattr(module, name))}\n" for name in module.__all__)


def entry(name: str, value: object) -> str:
    said = (inspect.getdoc(value) or "").split("\n\n")[0]
    said = " ".join(re.sub(r"``?", "`", said).split())
    what = "class " if inspect.isclass(value) else ""
    return f"{what}`{name}{signature(value)}`: {said}"


def signature(value: object) -> str:
    """Parameters and types as the code has them; an exception has none to tell."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    found = inspect.signature(value)  # type: ignore[arg-type]
    kinds = [p.kind for p in found.parameters.values()]
    parts = [parameter(p) for p in found.parameters.values()]
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        parts.insert(kinds.count(inspect.Parameter.POSITIONAL_ONLY), "/")
        kinds.insert(kinds.count(inspect.Parameter.POSITIONAL_ONLY), inspect.Parameter.empty)
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    text = f"({', '.join(parts)})"
    plain = inspect.isclass(value) or found.return_annotation in (found.empty, "None")
    return text if plain else f"{text} -> {typed(found.return_annotation)}"


def parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    text = f"{stars}{p.name}" + ("" if p.annotation is p.empty else f": {typed(p.annotation)}")
    if p.default is p.empty:
        return text
    if repr(p.default) == "<factory>":
        return f"{text} = ..."
    return f"{text} = {getattr(p.default, '__name__', repr(p.default))}"


def typed(annotation: object) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)
    text = text if isinstance(text, str) else inspect.formatannotation(text)
    text = re.sub(r"^Annotated\[(.+?), (Range|Unit|When)\(.*\]$", r"\1", text)
    return re.sub(r"(['\"]) (?=\w)", r"\1", text)  # the space is for a linter


def main() -> None:
    PAGE.write_text(render(PAGE.read_text("utf-8")), encoding="utf-8")
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
