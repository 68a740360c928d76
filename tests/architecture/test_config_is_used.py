"""Every key that a recipe accepts is read somewhere: none is accepted and then ignored."""

from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from align.config import keys as config

PACKAGE = Path(__file__).parents[2] / "align"
# the schema itself, and what treats all keys alike, do not count as uses
NOT_USES = {
    *("types.py", "cli.py", "commands/check.py", "commands/check_memory.py", "models/sizes.py"),
    *(f"config/{n}.py" for n in ("keys", "options", "ranges", "build", "effects", "load")),
}


def sections() -> set[type]:
    found: set[type] = set()
    todo = [v for n, v in vars(config).items() if n.endswith("Recipe")]
    while todo:
        cls = todo.pop()
        found.add(cls)
        hints = get_type_hints(cls).values()
        parts = [part for hint in hints for part in (hint, *get_args(hint)) if is_dataclass(part)]
        todo += [part for part in parts if part not in found]  # type: ignore[misc]
    return found


def attributes_read() -> set[str]:
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in NOT_USES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


READ = attributes_read()
KEYS = sorted(
    {
        f"{c.__name__}.{f.name}"
        for c in sections()
        for f in fields(c)
        if f.name in vars(c).get("__annotations__", {})
    }
)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read(key: str) -> None:
    assert key.split(".")[1] in READ, f"{key} is accepted in recipes and read by no code"
