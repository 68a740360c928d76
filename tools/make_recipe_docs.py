"""docs/recipe-keys.md: every key of every recipe, with type, range, unit, default and meaning.

    python tools/make_recipe_docs.py

All of it is in align/config/keys.py and sections.py: the annotation of a field, and the comment
above it. A test fails when the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "recipe-keys.md"
sys.path.insert(0, str(PAGE.parents[1]))

from align.config.describe import Key, describe, sections  # noqa: E402
from align.config.keys import CommonRecipe, ModelRecipe  # noqa: E402
from align.stages import recipe_classes  # noqa: E402

HEAD = """\
# Recipe keys

Every key of every recipe. Made by `python tools/make_recipe_docs.py` from the code; do not edit by
hand. `align sft --help` prints the keys of one command. How a recipe is written:
[recipes.md](recipes.md).

A dotted key such as `optim.lr` is `lr` in the section `optim`. In a recipe it is indented under its
section; on a command line it is `optim.lr=1e-5`. "null" means: not set. `[` and `]` of a range
include the end, `(` and `)` leave it out.
"""


def render() -> str:
    """Return the whole page."""
    recipes = recipe_classes()
    parts = [HEAD, _overview(recipes)]
    parts.append(_table("Keys of every command but `iterate`", ModelRecipe))
    starts = ", ".join(f"`{c}`" for c, cls in recipes.items() if issubclass(cls, CommonRecipe))
    parts.append(_table(f"Further keys of {starts}", CommonRecipe, known=ModelRecipe))
    for command, cls in recipes.items():
        known = next((base for base in (CommonRecipe, ModelRecipe) if issubclass(cls, base)), None)
        parts.append(_table(f"Further keys of `align {command}`", cls, known=known))
    shown: dict[str, type] = {}
    for command, cls in recipes.items():
        for name, inner in sections(cls):
            if inner not in shown.values():
                title = f"Section `{name}`" + (f" of `align {command}`" if name in shown else "")
                parts.append(_table(title, inner, prefix=f"{name}."))
                shown.setdefault(name, inner)
                shown[title] = inner
    return "\n".join(part for part in parts if part)


def _overview(recipes: Mapping[str, type]) -> str:
    lines = ["| command | sections |", "|---|---|"]
    for command, cls in recipes.items():
        names = [name for name, _ in sections(cls) if "." not in name]
        lines.append(f"| `align {command}` | {', '.join(f'`{n}`' for n in names)} |")
    return "\n".join(lines) + "\n"


def _table(title: str, cls: type, *, prefix: str = "", known: type | None = None) -> str:
    """The keys of a class but those of its base ``known``, unless it describes them anew."""
    told = {key.name: key for key in describe(known)} if known else {}
    inherited = {f.name for f in fields(known)} if known else set()
    rows = [
        _row(prefix, key)
        for key in describe(cls)
        if key.name not in inherited or told.get(key.name) != key
    ]
    heading = [
        f"## {title}\n",
        "| key | type, range, unit | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*heading, *rows]) + "\n" if rows else ""


def _row(prefix: str, key: Key) -> str:
    kind = " / ".join(f"`{c}`" for c in key.choices) or key.kind
    facts = ", ".join(f for f in (kind, key.range.replace("inf", "∞"), key.unit) if f)
    default = "**needed**" if key.default is None else f"`{key.default}`" if key.default else ""
    default = "null" if key.default == "null" else default
    return f"| `{prefix}{key.name}` | {facts} | {default} | {key.meaning} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE}: written")
