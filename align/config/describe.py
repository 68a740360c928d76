"""Describe every key of a recipe for `align STAGE --help` and docs/recipe-keys.md."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from align.config.annotations import Range, Unit, notes, section_class
from align.config.sections import DataSource, RewardTerm

ITEMS: dict[type, str] = {DataSource: "source, or a list", RewardTerm: "reward, or a list"}
"""Sections that a recipe may hold several of."""
SCALARS: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key: its name in its section, and texts about it; ``default`` is None where needed."""

    name: str
    kind: str
    choices: tuple[str, ...]
    range: str
    unit: str
    default: str | None
    meaning: str


def describe(cls: type) -> list[Key]:
    """Every key of a recipe or section, needed ones first; no section without a comment."""
    ranges = {name: note.interval for name, note in notes(cls, Range).items()}
    units = {name: note.name for name, note in notes(cls, Unit).items()}
    hints, meanings = get_type_hints(cls), _meanings(cls)
    found = [
        Key(
            name=f.name,
            kind=_kind(hints[f.name]),
            choices=_choices(hints[f.name]),
            range=ranges.get(f.name, "").replace("(-inf, inf)", ""),
            unit=units.get(f.name, ""),
            default=_default(f),
            meaning=meanings.get(f.name, ""),
        )
        for f in fields(cls)
    ]
    listed = [key for key in found if key.meaning or key.kind != "section"]
    return sorted(listed, key=lambda key: key.default is not None)


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, class) of every section of a recipe, sections of sections behind their own."""
    for name, hint in get_type_hints(cls).items():
        inner = section_class(hint)
        if inner is not None:
            yield f"{prefix}{name}", inner
            yield from sections(inner, f"{prefix}{name}.")


def help_text(cls: type, width: int) -> str:
    """The keys of a recipe, grouped by section, at most ``width`` columns wide."""
    parts = [_help_section("keys outside sections", cls, width)]
    shown: dict[type, str] = {}
    for name, inner in sections(cls):
        if inner in shown:
            parts.append(f"{name}: the keys of {shown[inner]}")
        else:
            shown[inner] = name
            title = " ".join((inspect.getdoc(inner) or "").split("\n\n")[0].split()).rstrip(".")
            parts.append(_help_section(f"{name}: {title}", inner, width))
    return "\n\n".join(parts)


def _help_section(title: str, cls: type, width: int) -> str:
    lines = textwrap.wrap(title.replace("``", ""), width)
    for key in describe(cls):
        value = " (needed)" if key.default is None else f" = {key.default}" if key.default else ""
        facts = [" | ".join(key.choices) or key.kind, key.range, key.unit]
        line = f"  {key.name + value:<32}  {', '.join(fact for fact in facts if fact)}"
        lines += textwrap.wrap(line, width, subsequent_indent=" " * 36)
        indent = " " * 6
        lines += textwrap.wrap(key.meaning, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


# ---------------------------------------------------------------- one field


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the comment lines directly above it, in the class or the nearest base with one."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        pending: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if line.startswith("    # "):
                pending.append(line[6:])
                continue
            field_line = re.match(r"    (\w+): ", line)
            if field_line and pending:
                found[field_line[1]] = " ".join(pending)
            pending = []
    return found


def _kind(hint: Any) -> str:
    args, inner = get_args(hint), section_class(hint)
    if inner is not None:
        return ITEMS.get(inner, "section")
    if type(None) in args:
        return _kind(next(a for a in args if a is not type(None)))
    if hint in SCALARS:
        return SCALARS[hint]
    if get_origin(hint) is tuple:
        return "list of texts"
    return "text" if get_origin(hint) is Literal else "name: text"


def _choices(hint: Any) -> tuple[str, ...]:
    """The values that a text may have, where they are few."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return args
    return next((found for a in args if (found := _choices(a))), ())


def _default(f: Field[Any]) -> str | None:
    if f.default_factory is not MISSING:
        made: Any = f.default_factory()
        if not is_dataclass(made):
            return ""
        kind: Any = type(made)
        plain = kind()  # what differs from the section's own defaults is shown
        changed = [item for item in vars(made).items() if item not in vars(plain).items()]
        return ", ".join(f"{name}={value:g}" for name, value in changed)
    if f.default is MISSING:
        return None
    if f.default is None:
        return "null"
    if isinstance(f.default, bool):
        return str(f.default).lower()
    if isinstance(f.default, tuple):
        return f"[{', '.join(map(str, f.default))}]" if f.default else ""
    return f"{f.default:g}" if isinstance(f.default, float) else str(f.default)
