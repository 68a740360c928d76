"""Imports run one way: types <- losses <- models <- rollout <- stages <- cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "align"

# imported by any room; they import nothing of this package but each other
LEAVES = {
    "types",
    "options",
    "files",
    "folders",
    "checksums",
    "growing",
    "locks",
    "machine",
    "progress",
    "console",
    "page_policy",
    "run_files",
    "run_folder",
    "run_identity",
    "doctor",
    "doctor_rules",
    "model_card",
    "nearest",
    "made_by",
    "hub",
}
CONFIG = {
    "config", "recipe_ranges", "recipe_builder", "recipe_effects", "recipe_checks", "recipe_text",
    "recipes_io",
}  # fmt: skip
# room -> the rooms of this package that it may import, besides itself and types
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "options": set(),
    "files": set(),
    "folders": set(),
    "checksums": set(),
    "growing": set(),
    "locks": set(),
    "machine": set(),
    "progress": set(),
    "console": set(),
    "page_policy": set(),
    "run_files": set(),
    "run_folder": set(),
    "run_identity": set(),
    "doctor": set(),
    "doctor_rules": set(),
    "model_card": set(),
    "nearest": set(),
    "made_by": set(),
    "hub": set(),
    "threads": set(),
    "losses": set(),
    "data": set(),
    "models": {"losses", "data"},
    "rollout": {"losses", "data", "models"},
    "rewards": {"losses", "data", "models", "rollout"},
    "training": {"losses", "data", "models", "config", "recipes_io"},
    "evaluation": {"losses", "data", "models", "rollout", "rewards", "config", "recipes_io"}
    | {"model_checks"},
    "stages": {"losses", "data", "models", "rollout", "rewards", "training", "evaluation"}
    | {"feedback", "model_checks"}
    | CONFIG,
    "config": set(),
    "recipe_ranges": set(),
    "recipe_builder": {"config", "recipe_ranges"},
    "recipe_effects": {"config", "recipe_builder"},
    "recipe_checks": {"config", "recipe_builder", "recipe_effects"},
    "recipe_text": {"recipe_builder"},
    "recipes_io": {"config", "recipe_builder", "recipe_checks", "recipe_text"},
    "model_sizes": {"models"} | CONFIG,
    "model_checks": {"models", "model_sizes"} | CONFIG,
    "memory": {"models", "losses", "model_sizes"} | CONFIG,
    "checking": {"data", "models", "memory", "model_sizes", "rewards", "rollout", "training"}
    | {"stages", "evaluation", "model_checks"}
    | CONFIG,
    "feedback": {"data", "evaluation"},
    "commands": {"data", "models", "feedback"},
    "report": {"evaluation"},
    "sweep": {"stages", "training", "evaluation", "report"} | CONFIG,
    "cli": {"threads", "checking", "stages", "evaluation", "commands", "report", "sweep"} | CONFIG,
    "__main__": {"cli"},
    "__init__": set(),
}
# room -> libraries that it never imports
FORBIDDEN = {"losses": {"transformers", "accelerate"}, "types": {"transformers", "accelerate"}}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"align.{n.name}" for n in node.names]
            yield from names if node.module == "align" else [node.module or ""]


def violations(room: str, names: Iterator[str] | list[str]) -> list[str]:
    found = []
    for name in names:
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        inside = top == "align" and other not in {"", room, "__version__"} | LEAVES
        if (inside and other not in ALLOWED[room]) or top in FORBIDDEN.get(room, set()):
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} is a new room: say here what it may import"
    assert violations(room, imports(path)) == []


def test_the_gate_rejects() -> None:
    assert violations("losses", ["align.config"]) == ["align.config"]
    assert violations("losses", ["transformers.models"]) == ["transformers.models"]
    assert violations("models", ["align.training.loop"]) == ["align.training.loop"]
    assert violations("evaluation", ["align.stages.ppo"]) == ["align.stages.ppo"]
    assert violations("stages", ["align.training.loop", "torch", "align.stages.sft"]) == []
