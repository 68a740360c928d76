"""Refuse text of a recipe that YAML or OmegaConf would read as something nobody means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from align.config.build import KeyProblem

ALLOW = "ALIGN_ALLOW_RESOLVERS"
"""Environment variable; 1 = recipes may call OmegaConf's functions."""

_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")


def odd_number(text: str) -> tuple[int, str] | None:
    """Find the first number that YAML 1.1 reads as another one: (line, what is wrong).

    It reads ``1:30`` as 90 and ``010`` as 8.
    """
    for node in _scalars(yaml.compose(text, Loader=yaml.SafeLoader), set()):
        if node.style is None and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            sixties = _SIXTIES.fullmatch(node.value)
            if sixties or _OCTAL.fullmatch(node.value):
                read = yaml.safe_load(node.value)
                base = "in sixties" if sixties else "as an octal number"
                return node.start_mark.line + 1, (
                    f"{node.value} would be read {base}, as {read}; write the number that is "
                    "meant, or text in quotes"
                )
    return None


def _scalars(node: Any, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    if node is None or id(node) in seen:  # an alias repeats a node that was checked already
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(key, seen)
            yield from _scalars(value, seen)


def refuse_functions(tree: Any, key: str = "") -> None:
    """Refuse ``${oc.env:NAME}`` and its like, so that a recipe reads nothing but itself.

    Raises:
        KeyProblem: With the key that calls a function.
    """
    if os.environ.get(ALLOW) == "1":
        return
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            refuse_functions(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            refuse_functions(value, f"{key}[{number}]")
    elif isinstance(tree, str) and _calls(tree):
        raise KeyProblem(
            key,
            f"is {tree!r:.60}, which calls a function of OmegaConf, such as one that reads "
            f"environment variables: off by default; write the value, give it on the command line "
            f'({key}="$NAME"), or set {ALLOW}=1 for a recipe that you trust',
        )


def _calls(text: str) -> bool:
    """Tell whether text holds ``${name:...}``; ``${other.key}`` has no colon."""
    depth = 0
    for found in re.finditer(r"\\.|\$\{|[}:]", text, re.DOTALL):
        if found[0] == "${":
            depth += 1
        elif found[0] == "}":
            depth = max(depth - 1, 0)
        elif found[0] == ":" and depth:
            return True
    return False
