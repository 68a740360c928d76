"""Local files and folders -> the files, and rows of them, that ``split`` asks for.

The syntax and the names are those of ``datasets``: ``train``, ``test[:100]``, ``train[10%:20%]``,
``train+test``; a folder's splits are told by ``train``, ``test``, ``validation`` and the like in
the names of its files or their folders. A split that selects nothing is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from align.base.files import read_json
from align.config.sections import DataSource
from align.types import AlignError

STATE = "state.json"
"""The file in which a saved data set names its files of rows."""
SAVE_AGAIN = "save the data set again with save_to_disk"

SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet",
    ".arrow",
)  # fmt: skip
KEYWORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words in a file's or a folder's name, as ``datasets`` has them."""
NOT_ROWS = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", STATE, "config.json"
)  # fmt: skip
"""Files that lie beside a data set's rows."""

Splits: TypeAlias = dict[str, list[Path]]
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}$")
_PART = re.compile(r"(\w+(?:\.\w+)*)(\[.*\])?(\(\w+\))?")


@dataclass(frozen=True)
class Choice:
    """Files and rows that a source reads of its path.

    Attributes:
        splits: Split -> files, of all that are read; in the order in which ``parts`` asks for them.
        parts: (split, slice of its rows as ``[a:b]`` or "").
        note: One line where something of the path is not read, else "".
    """

    splits: Mapping[str, Sequence[Path]]
    parts: tuple[tuple[str, str], ...]
    note: str = ""

    @property
    def files(self) -> list[Path]:
        """Every file that is read, once."""
        named = (file for split, _ in self.parts for file in self.splits[split])
        return list(dict.fromkeys(named))


def choose(source: DataSource, path: Path) -> Choice:
    """Find the files that ``source.split`` selects of a local file or folder.

    Raises:
        AlignError: It selects nothing, or what it selects is not clear.
    """
    if source.name is not None:
        raise AlignError(
            f"data: {path}: name={source.name} is the configuration of a hub data set, and this "
            "is local; remove it, or name the folder of that configuration as the path"
        )
    parts = split_parts(source)
    found, others = _splits(path)
    if not found:  # files without a split in their names are the training split
        found, others = {"train": others}, []
    wanted = list(dict.fromkeys(split for split, _ in parts))
    if parts == (("all", ""),) and "all" not in found:
        wanted = [name for i, name in enumerate(found) if found[name] not in [*found.values()][:i]]
        parts = tuple((name, "") for name in wanted)
    for split in wanted:
        if split not in found:
            raise AlignError(_no_such_split(source, path, split, found, others))
    if path.is_dir():
        _refuse_several_folders(path, [f for split in wanted for f in found[split]])
    choice = Choice(found, parts, _note(path, wanted, found, others))
    if not choice.files:
        raise AlignError(f"{path}: no data file in it; give a folder with rows")
    return choice


def split_parts(source: DataSource) -> tuple[tuple[str, str], ...]:
    """(split, slice) of each part of ``a[:10]+b``."""
    parts = []
    for text in source.split.split("+"):
        match = _PART.fullmatch(text.strip())
        if not match:
            raise AlignError(
                f"{source.path}: split={source.split!r} is no split; wanted a name with a slice "
                "if need be, such as train, test[:100] or train[10%:20%]"
            )
        parts.append((match[1], (match[2] or "") + (match[3] or "")))
    return tuple(parts)


def _splits(path: Path) -> tuple[Splits, list[Path]]:
    """(split -> files, files of no split); a saved data set says its splits itself."""
    if path.is_file():
        split = _split_of(Path(path.name))
        # a file that is called test.jsonl may be asked for as either
        return ({split: [path], "train": [path]}, []) if split else ({}, [path])
    if (path / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        folders = sorted(p for p in path.iterdir() if (p / "dataset_info.json").is_file())
        return {folder.name: _arrow_files(folder) for folder in folders}, []
    if (path / STATE).is_file():  # by Dataset.save_to_disk
        files = _arrow_files(path)
        return {str(_state(path).get("_split") or "train"): files, "train": files}, []
    files = _data_files(path, path.iterdir())
    found, others = _by_name(path, files)
    if files:
        return found, others
    nested = _data_files(path, path.rglob("*"))
    found, others = _by_name(path, nested)
    if not found:
        inside = sorted(p.name for p in path.iterdir() if p.is_dir())
        hint = f"its folders: {', '.join(inside[:5])}" if inside else "name another folder"
        raise AlignError(f"{path}: no data file in it ({', '.join(SUFFIXES)}); {hint}")
    return found, others


def _by_name(folder: Path, files: Iterable[Path]) -> tuple[Splits, list[Path]]:
    found: Splits = {}
    others = []
    for file in files:
        split = _split_of(file.relative_to(folder))
        if split:
            found.setdefault(split, []).append(file)
        else:
            others.append(file)
    return found, others


def _split_of(path: Path) -> str | None:
    """The split that a path's names tell: the outermost folder first, then the file."""
    for folder in path.parts[:-1]:
        if _keyword(folder):
            return _keyword(folder)
    stem = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    shard = _SHARD.fullmatch(stem)
    if shard is None:
        return _keyword(stem)
    name = shard[1]
    # the hub's own layout, data/train_sft-00000-of-00003.parquet: the name is the split
    is_split = path.parent.name == "data" or _keyword(name.split("_")[0])
    return name if is_split and not _is_keyword(name) else _keyword(name)


def _keyword(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    splits = (split for split, known in KEYWORDS.items() if any(word in known for word in words))
    return next(splits, None)


def _is_keyword(name: str) -> bool:
    return any(name in known for known in KEYWORDS.values())


def _data_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Sorted; hidden ones, and what tells of the data set without being its rows, left out."""

    def is_data(path: Path) -> bool:
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        return path.name.endswith(SUFFIXES) and path.name not in NOT_ROWS and not hidden

    return sorted(path for path in paths if is_data(path) and path.is_file())


def _arrow_files(folder: Path) -> list[Path]:
    """The files that a saved data set names; what ``map`` keeps beside them is not among them."""
    named = _state(folder).get("_data_files") or []
    files = []
    for file in named:  # a file that is fetched must not name one of this machine
        name = file.get("filename") if isinstance(file, dict) else file
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow"):
            raise AlignError(
                f"{folder / STATE}: names {str(name)[:100]!r} as rows, which is no .arrow file of "
                f"its folder; {SAVE_AGAIN}"
            )
        files.append(folder / name)
    return files or sorted(folder.glob("*.arrow"))


def _state(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / STATE):
        return {}
    state = read_json(folder / STATE, SAVE_AGAIN)
    named = state.get("_data_files") or []
    if not isinstance(named, list):
        raise AlignError(f"{folder / STATE}: _data_files: wanted a list of files; {SAVE_AGAIN}")
    return state


# ---------------------------------------------------------------- what is said


def _no_such_split(
    source: DataSource, path: Path, split: str, found: Splits, others: Sequence[Path]
) -> str:
    if path.is_file() or (len(found) == 1 and not others and "train" in found):
        what = "is one file" if path.is_file() else "has no file with a split in its name"
        return (
            f"{path}: split={source.split} selects nothing: the path {what}, and its rows are the "
            "split train; slice it (split: 'train[:90%]'), or name the file that holds the rows"
        )
    there = "; ".join(f"{name} ({_named(files)})" for name, files in found.items())
    more = f", and files of no split ({_named(others)})" if others else ""
    return (
        f"{path}: has no split {split}; it has {there}{more}; "
        f"say split: {next(iter(found))}, or name a file"
    )


def _refuse_several_folders(path: Path, files: Sequence[Path]) -> None:
    """Configurations side by side, ``en/train.jsonl`` and ``fr/train.jsonl``, are no one split."""
    homes = {file.parent for file in files}
    while homes and all(_split_of(home.relative_to(path) / "x") for home in homes):
        homes = {home.parent for home in homes}  # train/a/x.jsonl, train/b/y.jsonl
    if len(homes) > 1:
        named = ", ".join(sorted(str(home.relative_to(path)) for home in homes)[:5])
        raise AlignError(f"{path}: several of its folders hold the split: {named}; name one")


def _note(path: Path, wanted: Sequence[str], found: Splits, others: Sequence[Path]) -> str:
    left = {name: files for name, files in found.items() if name not in wanted}
    if path.is_file() or not (left or others):
        return ""
    if not others and all(files in [found[name] for name in wanted] for files in left.values()):
        return ""  # one data set under two names
    unread = [f"split {name} ({_named(files)})" for name, files in left.items()]
    unread += [f"files of no split ({_named(others)})"] if others else []
    read = [file for name in wanted for file in found[name]]
    return (
        f"{path}: split {' + '.join(wanted)} is read ({_named(read)}); "
        f"not read: {', '.join(unread)}"
    )


def _named(files: Sequence[Path]) -> str:
    """The first names and how many more."""
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return ", ".join(file.name for file in files[:2]) + more
