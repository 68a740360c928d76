"""Build frozen dataclasses from plain dicts, strictly.

An unknown key, a wrong type or a number out of range is an error that names the key. Nothing is
coerced but a whole number where a float is meant.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from align.base.suggest import alike, suggest
from align.config.annotations import Range, notes, section_class
from align.config.names import ALIASES, RENAMED
from align.config.sections import DataConfig, RewardTerm

T = TypeVar("T")


class KeyProblem(Exception):
    """Wrong value of a key; the loader adds the name of the file."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


def build(
    cls: type[T], value: Any, key: str = "", *, root: type | None = None, default: T | None = None
) -> T:
    """Make ``cls`` from a mapping.

    Args:
        key: Dotted key of the section, for error messages.
        root: Class of the whole recipe, for hints about misspelt keys.
        default: Section of a recipe that leaves it out; fills the keys that the mapping leaves out.

    Raises:
        KeyProblem: A key is unknown, missing, or holds a wrong type or a number out of range.
    """
    root = root or cls
    if not isinstance(value, Mapping):
        _wrong_type(key, value, "a mapping of keys")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise unknown_key(_join(key, str(name)), root)
    hints, ranges = get_type_hints(cls), notes(cls, Range)
    made = {}
    for name, f in known.items():
        if name in value:
            child = _join(key, name)
            if is_dataclass(hints[name]) and f.default_factory is not MISSING:
                inner = f.default_factory()
                if value[name] is None and isinstance(inner, DataConfig):  # no data
                    made[name] = DataConfig()
                    continue
                made[name] = build(hints[name], value[name], child, root=root, default=inner)
            else:
                made[name] = _convert(hints[name], value[name], child, root)
            _check_range(ranges.get(name), made[name], child)
        elif default is not None:
            made[name] = getattr(default, name)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise KeyProblem(_join(key, name), "is missing and has no default; set it")
    record = cls(**made)
    if isinstance(record, RewardTerm):
        _check_reward_term(record, key)
    return record


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield every key that a recipe of this class may set, sections included."""
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        section = section_class(hint)
        if section:
            yield from dotted_keys(section, f"{prefix}{name}.")


def unknown_keys(cls: type, tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree that are no keys of this class, without those inside lists.

    A section where the class has a single value counts as unknown.
    """
    hints = get_type_hints(cls)
    for name, value in tree.items():
        key, hint = _join(prefix, str(name)), hints.get(name)
        section = section_class(hint)
        if isinstance(value, Mapping) and section is not None:
            yield from unknown_keys(section, value, key)
        elif hint is None or (isinstance(value, Mapping) and get_origin(hint) is not Mapping):
            yield key


# ---------------------------------------------------------------- one value


def _convert(hint: Any, value: Any, key: str, root: type) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _convert(inner, value, key, root)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            allowed = ", ".join(args)
            raise KeyProblem(key, f"is {_show(value)}; allowed: {allowed}")
        return value
    if origin is tuple:
        return _convert_tuple(args[0], value, key, root)
    if origin is not None and issubclass(origin, Mapping):
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            _wrong_type(key, value, "a mapping of names to texts")
        return {str(k): _text(v, _join(key, str(k))) for k, v in value.items()}
    if is_dataclass(hint):
        return build(hint, value, key, root=root)  # type: ignore[arg-type]
    return _SCALARS[hint](value, key)


def _convert_tuple(item: Any, value: Any, key: str, root: type) -> tuple[Any, ...]:
    """Convert a list, or one item without its brackets.

    A data source may be its path alone, a reward its model or its ``module:function`` alone.
    """
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    if is_dataclass(item):
        short = _short_reward if item is RewardTerm else (lambda path: "path")
        items = [{short(i): i} if isinstance(i, str) else i for i in items]
    names = [key if not isinstance(value, list) else f"{key}[{i}]" for i in range(len(items))]
    return tuple(_convert(item, i, name, root) for i, name in zip(items, names, strict=True))


def _short_reward(name: str) -> str:
    """Choose the key of a reward that is a text alone: ``module:function`` is not a model."""
    return "function" if re.fullmatch(r"[\w.]+:\w+", name) else "model"


def _bool(value: Any, key: str) -> bool:
    return value if isinstance(value, bool) else _wrong_type(key, value, "true or false")


def _int(value: Any, key: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole else _wrong_type(key, value, "a whole number")


def _float(value: Any, key: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-5, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _wrong_type(key, value, "a number")
    return float(value)


def _text(value: Any, key: str) -> str:
    if isinstance(value, int | float):
        _wrong_type(key, value, "text (put it in quotes)")
    return value if isinstance(value, str) and value else _wrong_type(key, value, "text")


_SCALARS: dict[type, Callable[[Any, str], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _text,
}


# ---------------------------------------------------------------- what can be wrong


def _check_range(allowed: Range | None, value: Any, key: str) -> None:
    if allowed is not None and value is not None and value not in allowed:
        raise KeyProblem(key, f"is {_show(value)}; allowed: {allowed}")


def _check_reward_term(term: RewardTerm, key: str) -> None:
    kinds = ("model", "function", "metric")
    given = [kind for kind in kinds if getattr(term, kind) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise KeyProblem(key, f"has {got}; a reward sets exactly one of {', '.join(kinds)}")
    if term.weight == 0:
        raise KeyProblem(f"{key}.weight", "is 0, which leaves the reward out; remove the reward")
    if term.function is None and term.timeout != RewardTerm().timeout:
        raise KeyProblem(f"{key}.timeout", f"has no effect on a {given[0]}; it is for a function")


def unknown_key(key: str, root: type) -> KeyProblem:
    """Make the problem of an unknown key of a ``root`` recipe, with the key that was meant."""
    leaf = key.rsplit(".", 1)[-1]
    known = list(dotted_keys(root))
    renamed = RENAMED.get(root.__name__, {}).get(key)
    if renamed:
        return KeyProblem(key, f"is {renamed} since version 0.2")
    alias = ALIASES.get(leaf)
    near = alias if alias in known else suggest(key, known, likeness=_likeness)
    if near:
        return KeyProblem(key, f"no such key; did you mean {near}?")
    there = ", ".join(k for k in known if "." not in k)
    return KeyProblem(key, f"no such key; keys here: {there}")


def _wrong_type(key: str, value: Any, wanted: str) -> NoReturn:
    raise KeyProblem(key or "recipe", f"is {_show(value)}; wanted {wanted}")


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _likeness(name: str, candidate: str) -> float:
    """Score how near two dotted keys are; a right key in the wrong section counts as near."""
    leaf = name.rsplit(".", 1)[-1]
    return max(
        _ratio(name, candidate),
        _ratio(leaf, candidate),
        _ratio(leaf, candidate.rsplit(".", 1)[-1]) - 0.05,
    )


def _ratio(a: str, b: str) -> float:
    return alike(a.replace(".", "_"), b.replace(".", "_"))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
