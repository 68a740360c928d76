"""Find a recipe, read it, apply ``key=value`` overrides, and write it back.

A recipe is a path or a shipped name such as ``tiny/sft``. Relative paths inside a recipe are
relative to the folder that the command runs in. OmegaConf parses; build.py checks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.base.suggest import suggest
from align.config.annotations import section_class
from align.config.build import KeyProblem, build, unknown_key, unknown_keys
from align.config.checks import check_whole
from align.config.names import RENAMED
from align.config.text import odd_number, refuse_functions
from align.types import AlignError

R = TypeVar("R")

DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
"""File endings of data, which no recipe has."""

COMMAND_LINE = "command line"
ARGUMENTS = "arguments"
REPLACES = {"data.test": "data.test_fraction", "train.max_steps": "train.epochs"}
"""Override -> the recipe's key that it replaces, which would have no effect beside it."""

# an impossible date, a number of thousands of digits and deep nesting raise Python's own errors
UNREADABLE = (
    OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, RecursionError
)  # fmt: skip


def load_recipe(
    cls: type[R],
    recipe: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    others: Mapping[str, type] | None = None,
    but: Collection[str] = (),
) -> R:
    """Read a recipe and its overrides into ``cls``; later overrides win.

    ``recipe`` is a path, a shipped name, or a mapping as YAML would give it. ``values`` are further
    overrides, dotted key -> value as Python has it.

    An override replaces the key's value. ``data=FILE`` replaces the training data and drops the
    recipe's own test data, so that ``data.test_fraction`` of FILE is held out instead;
    ``data.train=FILE`` replaces the training data alone. `REPLACES` lists what else is dropped.

    Args:
        others: Command -> recipe class, for the hint when the recipe is for another command.
        but: Keys that the caller sets, so that they may be without effect in the recipe.

    Raises:
        AlignError: One line with the file, the key, its value and what is allowed.
    """
    path = find_recipe(recipe) if isinstance(recipe, str) else Path("recipe")
    read = _read_yaml(path) if isinstance(recipe, str) else copy.deepcopy(dict(recipe))
    tree = _normalised(read)
    if path.name == "config.yaml" and (path.parent / "manifest.json").is_file():
        tree = _with_current_names(tree, RENAMED.get(cls.__name__, {}))
    theirs = (others or {}).get(path.stem) if isinstance(recipe, str) else None
    if theirs is not None and theirs is not cls:
        raise AlignError(f"{path}: is a recipe for `align {path.stem}` by its name; run that")
    from_command_line: list[str] = []
    for override in overrides:
        from_command_line.append(_apply(tree, override))
    for key, value in (values or {}).items():
        _set(tree, key, value, ARGUMENTS)
    try:
        built = build(cls, _resolved(tree, path))
        check_whole(built, but=but)
    except KeyProblem as problem:
        overridden = any(_covers(key, problem.key) for key in from_command_line)
        given = any(_covers(key, problem.key) for key in values or ())
        where = COMMAND_LINE if overridden else ARGUMENTS if given else path
        meant = None if overridden or given else _meant_for(tree, cls, others or {})
        if meant:
            raise AlignError(f"{path}: is a recipe for `align {meant}`; run that") from problem
        raise AlignError(f"{where}: {problem}") from problem
    return built


def section_of(cls: type, key: str) -> type | None:
    """Find the class of a recipe's section, dotted; None where the key is no section."""
    found: type | None = cls
    for name in key.split("."):
        hint = get_type_hints(found).get(name) if found else None
        found = None if get_origin(hint) is tuple else section_class(hint)
    return found


def to_yaml(recipe: Any) -> str:
    """Write the recipe as YAML that ``load_recipe`` reads back into an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(recipe))))


# ---------------------------------------------------------------- finding


def recipes_root() -> Path:
    """Folder of the shipped recipes: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Map the name of every shipped recipe to its file, without Accelerate's launch files."""
    root = recipes_root()
    files = sorted(p for p in root.rglob("*.yaml") if p.parent.name != "accelerate")
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in files}


def find_recipe(recipe: str) -> Path:
    """Find the file of a path or of a shipped name; a path wins."""
    path = Path(recipe)
    if path.is_file():
        if path.name.endswith(DATA):
            raise AlignError(f"{recipe}: a data file, not a recipe; wanted RECIPE data={recipe}")
        return path
    if path.exists() and not path.is_dir():  # reading a pipe would wait
        raise AlignError(f"{recipe}: a pipe or a device, not a recipe")
    shipped = shipped_recipes()
    name = recipe.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = suggest(recipe, [*shipped, *beside])
    hint = f"did you mean {near}?" if near else "`align ls` shows the shipped ones"
    raise AlignError(f"{recipe}: no such recipe; {hint}")


def first_comment(path: Path) -> str:
    """Read a recipe's description: its first line, if that is a comment."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def stage_of(recipe: str, stages: Mapping[str, type], overrides: Sequence[str] = ()) -> str:
    """Name the command of a recipe by a word in its file's name, else by its keys.

    A misspelt key still leaves the stage whose recipe has all others.

    Raises:
        AlignError: Several stages take these keys; the message names them.
    """
    path = find_recipe(recipe)
    words = re.split(r"[-_.]", path.stem.lower())
    named = [stage for stage in stages if stage in words]
    if len(named) == 1:
        return named[0]
    tree = _normalised(_read_yaml(path))
    for override in overrides:
        _apply(tree, override)
    if not tree:
        raise AlignError(f"{path}: holds no key; a recipe has at least model, data and output_dir")
    unknown = {stage: list(unknown_keys(cls, tree)) for stage, cls in stages.items()}
    # a key that is wrong inside a section tells less than a section that a stage has not
    wrong = {
        stage: (sum("." not in key for key in keys), len(keys)) for stage, keys in unknown.items()
    }
    fitting = [stage for stage in stages if wrong[stage] == min(wrong.values())]
    for fits in (_lacks_nothing, _builds):
        fitting = [stage for stage in fitting if fits(stages[stage], tree)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    several = f"{', '.join(fitting[:-1])} and {fitting[-1]}"
    say = f"say --stage {'|'.join(fitting)}"
    if not unknown[fitting[0]]:
        raise AlignError(f"{path}: its keys fit {several}; {say}")
    problem = unknown_key(unknown[fitting[0]][0], stages[fitting[0]])
    raise AlignError(f"{path}: {problem}; its other keys fit {several}: {say}")


def _lacks_nothing(cls: type, tree: Mapping[str, Any]) -> bool:
    """Tell whether the tree has every key without a default."""
    return all(
        f.name in tree or f.default is not MISSING or f.default_factory is not MISSING
        for f in fields(cls)
    )


def _builds(cls: type, tree: Mapping[str, Any]) -> bool:
    try:
        build(cls, tree)
    except KeyProblem:
        return False
    return True


# ---------------------------------------------------------------- reading


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        odd = odd_number(path.read_text(encoding="utf-8"))
        tree = OmegaConf.to_container(loaded, resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise AlignError(f"{path}:{line}: not YAML: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise AlignError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except UNREADABLE as error:
        raise AlignError(f"{path}: not a recipe: {_first_line(error)}") from error
    if odd:
        raise AlignError(f"{path}:{odd[0]}: {odd[1]}")
    if not isinstance(tree, dict):
        raise AlignError(f"{path}: holds a list; wanted a mapping such as `model: FOLDER`")
    return tree  # type: ignore[return-value]


def _apply(tree: dict[str, Any], override: str) -> str:
    """Set one ``a.b=c`` in the tree and return its key."""
    key, sign, text = override.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise AlignError(f"{COMMAND_LINE}: {override!r}: wanted key=value, such as optim.lr=1e-5")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        value = parsed["value"]
        odd = odd_number(text)
    except UNREADABLE as error:
        raise AlignError(f"{COMMAND_LINE}: {key}: {_first_line(error)}; quote it") from error
    if odd:
        raise AlignError(f"{COMMAND_LINE}: {key}: {odd[1]}")
    return _set(tree, key, value, COMMAND_LINE)


def _set(tree: dict[str, Any], key: str, value: Any, where: str) -> str:
    """Set the dotted key in the tree and return it, with ``.train`` behind a lone ``data``."""
    if key == "data" and not isinstance(value, dict):
        key = "data.train"
        if isinstance(tree.get("data"), dict):
            tree["data"].pop("test", None)
    section, _, leaf = REPLACES.get(key, "").partition(".")
    if leaf and value not in (None, []) and isinstance(tree.get(section), dict):
        tree[section].pop(leaf, None)
    *sections, leaf = key.split(".")
    place = tree
    for section in sections:
        inner = place.get(section)
        if inner is None:  # lora.r=8 over `lora: null` switches lora on
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise AlignError(
                f"{where}: {key}: {section} holds {type(inner).__name__}, which has no "
                f"keys of its own; set {section}=... as a whole"
            )
        place = inner
    place[leaf] = value
    return key


def _normalised(tree: dict[str, Any]) -> dict[str, Any]:
    """Write ``data: file`` and ``data: [..]`` as ``data: {train: ...}``."""
    if isinstance(tree.get("data"), str | list):
        tree["data"] = {"train": tree["data"]}
    return tree


def _with_current_names(tree: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Move the keys that a run of an earlier version wrote to where they are now."""
    for old, new in renamed.items():
        if old in tree:
            section, _, leaf = new.partition(".")
            tree.setdefault(section, {}).setdefault(leaf, tree.pop(old))
    return tree


def _resolved(tree: dict[str, Any], path: Path) -> Any:
    """Replace ``${other.key}`` by the other key's value."""
    refuse_functions(tree)
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except UNREADABLE as error:
        raise AlignError(f"{path}: {_first_line(error)}") from error


def _meant_for(tree: Mapping[str, Any], cls: type, others: Mapping[str, type]) -> str | None:
    """Name the one command whose recipes have every section of this one, where ``cls`` has not."""

    def fits(other: type) -> bool:
        return tree.keys() <= {f.name for f in fields(other)}

    fitting = [command for command, other in others.items() if fits(other)]
    return fitting[0] if len(fitting) == 1 and not fits(cls) else None


def _covers(override: str, key: str) -> bool:
    """Tell whether the override set this key, its section or a key inside it."""
    return f"{key}.".startswith((f"{override}.", f"{override}[")) or override.startswith(f"{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _escaped(value: Any) -> Any:
    """Turn tuples into lists, and keep ``${`` from being read as a reference."""
    if isinstance(value, dict):
        return {k: _escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(v) for v in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
