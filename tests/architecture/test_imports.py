"""Packages import one way only, and each imports the libraries that it is allowed to.

types <- base <- {config.keys, losses} <- data <- {models, feedback, run}
      <- {rollout, rewards, training} <- evaluation <- {stages, report} <- commands <- cli
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "align"
AT_THE_ROOT = {"__init__", "__main__", "cli", "types"}

# recipes and their sections; the other modules of config read files, for the top of the house
KEYS = "config.keys config.sections"
LOAD = f"{KEYS} config.load"
MOST = f"base types {LOAD} losses data models feedback run rollout rewards"
# package -> the packages (of config: the modules) that it may import, besides itself
ALLOWED: dict[str, str] = {
    "types": "",
    "base": "types",
    "config": "base types",
    "losses": "",
    "data": f"base types {KEYS}",
    "models": f"base types {KEYS} losses data",
    "feedback": f"base types {KEYS} data",
    "run": "base types config.names",
    "rollout": f"base types {KEYS} losses data models",
    "rewards": f"base types {KEYS} data models",
    "training": f"base types {KEYS} data models run",
    "evaluation": f"base types {LOAD} data models run rollout rewards",
    "stages": f"{MOST} training evaluation",
    "report": "base types run evaluation __version__",
    "commands": f"{MOST} training evaluation stages report",
    "cli": f"base types {LOAD} config.describe run stages evaluation report commands __version__",
    "__main__": "cli",
    "__init__": "types run stages",
}
# package -> the libraries that it may import, besides Python's own
LIBRARIES: dict[str, str] = {
    "types": "jaxtyping numpy torch",
    "base": "filelock huggingface_hub numpy psutil safetensors scipy torch tqdm yaml",
    "config": "omegaconf yaml",
    "losses": "jaxtyping torch",
    "data": "datasets numpy pyarrow torch",
    "models": "huggingface_hub numpy peft safetensors tokenizers torch transformers",
    "feedback": "filelock flask numpy scipy",
    "run": "huggingface_hub yaml",
    "rollout": "numpy torch transformers vllm",
    "rewards": "numpy sacrebleu torch transformers",
    "training": "accelerate numpy safetensors torch",
    "evaluation": "accelerate evaluate numpy sacrebleu safetensors scipy torch",
    "stages": "accelerate huggingface_hub matplotlib numpy pyarrow torch transformers",
    "report": "jinja2 markupsafe matplotlib numpy rich yaml",
    "commands": "rich torch werkzeug",
    "cli": "",
    "__main__": "",
    "__init__": "",
}


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute name of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from names if node.module in ("align", "align.config") else [node.module or ""]


def violations(package: str, names: Iterable[str]) -> list[str]:
    """Imports among ``names`` that ``package`` is not allowed."""
    found = []
    for name in names:
        top, _, inside = name.partition(".")
        if top == "align":
            parts = inside.split(".")
            other = ".".join(parts[:2]) if parts[0] == "config" else parts[0]
            allowed = parts[0] == package or other in ALLOWED[package].split()
        else:
            allowed = top in sys.stdlib_module_names or top in LIBRARIES[package].split()
        if not allowed:
            found.append(name)
    return found


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_run_one_way(path: Path) -> None:
    package = package_of(path)
    assert package in ALLOWED, f"{package} is a new package: say here what it may import"
    assert violations(package, imports(path)) == []


def test_the_root_holds_what_users_import_only() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("losses", "transformers.models"),
        ("losses", "accelerate"),
        ("losses", "align.types"),
        ("data", "align.models.load"),
        ("data", "transformers"),
        ("base", "align.run.folder"),
        ("run", "align.training.saver"),
        ("models", "align.training.loop"),
        ("rollout", "align.rewards"),
        ("training", "align.evaluation.harness"),
        ("evaluation", "align.stages.ppo.run"),
        ("report", "align.stages.sft"),
        ("stages", "align.commands.check"),
        *((p, "align.config.load") for p in ("data", "models", "rollout", "rewards", "training")),
        ("config", "torch"),
        ("cli", "torch"),
    ],
)
def test_the_gate_rejects(package: str, name: str) -> None:
    assert violations(package, [name]) == [name]


def test_the_gate_lets_pass() -> None:
    names = ["align.training.loop", "torch", "align.stages.sft", "align.config.load", "json"]
    assert violations("stages", names) == []


def test_no_two_packages_import_each_other() -> None:
    """Every package can be put behind those that it imports: there is no cycle."""
    needs: dict[str, set[str]] = {package: set() for package in ALLOWED}
    for path in PACKAGE.rglob("*.py"):
        names = [n.split(".")[1] for n in imports(path) if n.startswith("align.")]
        needs[package_of(path)] |= {n for n in names if n in ALLOWED} - {package_of(path)}
    arrows = sum(map(len, needs.values()))
    while free := [package for package, others in needs.items() if not others]:
        for package in free:
            del needs[package]
        for others in needs.values():
            others.difference_update(free)
    assert not needs, f"a cycle among {sorted(needs)}"
    assert arrows <= 90
