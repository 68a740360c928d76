"""Objects of Python in a call: what stands in the recipe instead of each.

Rows are a source that is read like a file as long as the call lasts. A model is written into the
run's folder, as safetensors and named by its content, and loaded from there, so that every check of
a model on disk holds for it and a run can be resumed. A function is named by its module.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from align.base.console import reason_in_line
from align.config.load import section_of
from align.config.sections import DataSource
from align.data.readers.objects import given
from align.run.files import MANIFEST, REPLACED, remove
from align.stages.given_models import content_of, facts_of, save_model, texts_in
from align.types import AlignError

FOLDER = "given"
"""In a run's folder, holds the models that were given as objects."""
PLACE = "<output_dir>"
"""Placeholder for the run's folder until the recipe is read."""
SAVED = re.compile(rf"\b{FOLDER}/([\w-]+-[0-9a-f]{{12}})\b")
"""Name of a saved model in a manifest's line about it."""
KEPT = "_objects"
"""Attribute of a recipe that was read, with the objects that were given for it."""
SOURCES = ("data", "data.train", "data.test", "preferences.train", "preferences.test")
"""Keys whose values are sources of rows."""
SOURCE_KEYS = {f.name for f in fields(DataSource)}
WANTED = "a path, a list of rows (mappings), a datasets.Dataset, or a list of these"


class Given:
    """The objects of one call, in a context: its rows can be read until it ends.

    Attributes:
        facts: Key -> one line about its object, for the manifest.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.facts: dict[str, str] = {}
        self._open = ExitStack()
        self._models: dict[str, Any] = {}
        self._unused: list[str] = []
        self._rows_by_path: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    # ------------------------------------------------------------ a recipe's objects

    def keep(self, recipe: Any, folder: Path) -> None:
        """Put the objects of a recipe that was read beside its keys; `take` finds them."""
        models = {str(folder / path): model for path, model in self._models.items()}
        object.__setattr__(recipe, KEPT, ({**self._rows_by_path, **models}, self.tokenizer))

    def take(self, recipe: Any) -> None:
        """Use the objects that `keep` has put beside a recipe where it names them."""
        self._kept, tokenizer = getattr(recipe, KEPT, ({}, None))
        self.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer

    # ------------------------------------------------------------ reading a call

    def flat(
        self, cls: type, keys: Mapping[str, Any], prefix: str = ""
    ) -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of nested keyword arguments, every object replaced."""
        for name, value in keys.items():
            key = f"{prefix}{name}"
            section = section_of(cls, key)
            if section is None or not isinstance(value, Mapping) or _is_source(key, value):
                if key not in SOURCES:
                    yield key, self._plain(key, value)
                    continue
                found = self._sources(key, value)
                yield key, [found] if isinstance(found, dict) else found
            elif value:
                yield from self.flat(cls, value, f"{key}.")
            else:
                yield key, {}

    def _sources(self, key: str, value: Any) -> Any:
        """Sources of rows as a recipe names them."""
        if value is None or isinstance(value, str | os.PathLike):
            return self._plain(key, value)
        if isinstance(value, Mapping) and "path" in value:
            return self._source(key, value)
        if _is_dataset(value) or (_is_list(value) and _are_rows(value)):
            return self._rows(key, value)
        if _is_list(value) and len(value):
            numbered = enumerate(value)
            return [self._sources(f"{key}[{number}]", one) for number, one in numbered]
        if isinstance(value, tuple) and not value:  # of a recipe that was read
            return []
        if isinstance(value, list) and not value:
            raise AlignError(f"{key}: is an empty list; wanted {WANTED}")
        raise AlignError(f"{key}: is a {_kind(value)}; wanted {WANTED}")

    def _source(self, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """``{"path": ..., "weight": ...}``, whose path may be rows."""
        path: Any = value.get("path")
        if isinstance(path, str) and path in self._kept:
            return {**value, **self._rows(path[1:-1], self._kept[path])}
        if isinstance(path, str | os.PathLike):
            return {**value, "path": self._plain(f"{key}.path", path)}
        if _is_dataset(path) or (_is_list(path) and _are_rows(path)):
            return {**value, **self._rows(key, path)}
        raise AlignError(f"{key}.path: is a {_kind(path)}; wanted a path, rows, or a Dataset")

    def _rows(self, key: str, rows: Any) -> dict[str, Any]:
        while f"<{key}>" in self._rows_by_path:  # a recipe's, which these may replace
            key = f"{key} (new)"
        self.facts[key] = _kind(rows)
        path = self._open.enter_context(given(rows, key))
        self._rows_by_path[path] = rows
        return {"path": path}

    def _plain(self, key: str, value: Any) -> Any:
        """A value as YAML has it."""
        if isinstance(value, str) and value in self._kept:
            return self._model(key, self._kept[value])
        if isinstance(value, str | os.PathLike):
            text = os.fspath(value)
            if "\0" in text:
                raise AlignError(f"{key}: has a null character; take it out")
            return text
        if isinstance(value, Mapping):
            return {str(k): self._plain(f"{key}.{k}", v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(key, one) for one in value]
        if _is_model(value):
            return self._model(key, value)
        if callable(value):
            return self._function(key, value)
        if hasattr(value, "dtype") and hasattr(value, "tolist"):
            value = value.tolist()
        if value is None or isinstance(value, int | float | list):
            return value
        kind = _kind(value)
        raise AlignError(
            f"{key}: is a {kind}; wanted text, a number, or a list or mapping of these"
        )

    # ------------------------------------------------------------ functions

    def _function(self, key: str, function: Any) -> str:
        """``module:name`` of a function that can be found again by it."""
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
        if getattr(sys.modules.get(module or ""), name, None) is not function:
            raise AlignError(
                f"{key}: {_kind(function)} {name or repr(function)} cannot be found again by a "
                "name; define it with def at the top of a module, a script or a notebook"
            )
        return f"{module}:{name}"

    # ------------------------------------------------------------ models

    def _model(self, key: str, model: Any) -> str:
        """A path below the run's folder, which `place` fills in."""
        if self.tokenizer is None:
            raise AlignError(
                f"{key}: is a {_kind(model)} without its tokenizer; give tokenizer=... beside it, "
                "or the model's folder or hub id instead"
            )
        try:
            content = content_of(model, self.tokenizer)[:12]
        except Exception as error:  # weights that are on no device, a tokenizer that is none
            raise AlignError(
                f"{key}: the {_kind(model)} with its tokenizer ({_kind(self.tokenizer)}) cannot be "
                f"saved: {reason_in_line(error)}; save it with save_pretrained and give the folder"
            ) from error
        path = f"{FOLDER}/{key.replace('.', '_')}-{content}"
        self._models[path] = model
        self.facts[key] = f"{_kind(model)}, saved in {path} and loaded from there"
        return f"{PLACE}/{path}"

    def require_used(self) -> None:
        """Refuse a tokenizer beside a model that has its own."""
        if self.tokenizer is not None and not self._models:
            raise AlignError(
                "tokenizer: is for a model that is given as an object; a model that is named has "
                "its tokenizer beside it"
            )

    def place(self, value: Any, folder: Path) -> Any:
        """Replace the placeholder in the models' paths with ``folder``."""
        if isinstance(value, dict):
            return {key: self.place(one, folder) for key, one in value.items()}
        if isinstance(value, list):
            return [self.place(one, folder) for one in value]
        if isinstance(value, str) and value.startswith(f"{PLACE}/"):
            return str(folder / value.removeprefix(f"{PLACE}/"))
        return value

    def save(self, folder: Path) -> list[Path]:
        """Write the models into the run's folder; returns what was not there before."""
        written = []
        for path, model in self._models.items():
            if not (folder / path).is_dir():
                save_model(folder / path, model, self.tokenizer)
                written.append(folder / path)
        return written

    def claim(self, folder: Path, recipe: Any) -> None:
        """Find the models that an earlier run of ``folder`` was given; keep those in ``recipe``.

        Raises:
            AlignError: The folder holds no run, but something under the name that models get.
        """
        manifests = [folder / MANIFEST, folder / REPLACED / MANIFEST]
        held = [path for path in manifests if path.is_file()]
        place = folder / FOLDER
        inside = [f"{FOLDER}/{found.name}" for found in place.glob("*")]
        if os.path.lexists(place) and not place.is_dir():
            inside = [FOLDER]
        foreign = sorted(set(inside) - self._models.keys())
        if foreign and not held and not getattr(recipe, "overwrite", False):
            raise AlignError(
                f"output_dir: {folder} holds {foreign[0]}, but no run (manifest.json); name "
                "another output_dir, or add overwrite=True to run beside it"
            )
        named = [os.path.realpath(text) for text in texts_in(asdict(recipe))]
        self._drop_replaced(named)
        for path in held:
            for key, line in facts_of(path).items():
                match = SAVED.search(line)
                if match and any(match[1] in text for text in named):
                    self.facts.setdefault(key, line)
                elif match:
                    self._unused.append(match[0])

    def _drop_replaced(self, named: Sequence[str]) -> None:
        """Drop a recipe's objects in whose place the call's keys name others."""
        for path in [p for p in self._models if not any(p in text for text in named)]:
            del self._models[path]
            self.facts = {key: line for key, line in self.facts.items() if path not in line}
        for path in [p for p in self._rows_by_path if not any(p in text for text in named)]:
            self.facts.pop(path[1:-1], None)

    def discard(self, folder: Path, written: Sequence[Path]) -> None:
        """Remove models of a run that was refused: what its folder holds is not about them."""
        manifest = folder / MANIFEST
        text = manifest.read_text("utf-8", "replace") if manifest.is_file() else ""
        for path in written:
            if path.name not in text:
                shutil.rmtree(path)
        self._remove_empty(folder, written)

    def remove_unused(self, folder: Path) -> None:
        """Remove models that an earlier run was given, by its manifest, and this one does not use.

        Nothing else in the folder is touched: it may be the user's.
        """
        for path in set(self._unused) - self._models.keys():
            with suppress(OSError):  # the run is done; what stays takes room and does no harm
                remove(folder / path)
        self._remove_empty(folder, self._unused)

    def _remove_empty(self, folder: Path, removed: Sequence[Any]) -> None:
        if removed:
            with suppress(OSError):  # not empty: something of another run is there
                (folder / FOLDER).rmdir()


# ---------------------------------------------------------------- what a value is


def _is_source(key: str, value: Mapping[str, Any]) -> bool:
    return key in SOURCES and "path" in value and value.keys() <= SOURCE_KEYS


def _are_rows(value: Sequence[Any]) -> bool:
    """Tell whether a list holds rows rather than sources of rows, by its first item."""
    return bool(len(value)) and isinstance(value[0], Mapping) and not _is_source("data", value[0])


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_dataset(value: Any) -> bool:
    datasets = sys.modules.get("datasets")
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return datasets is not None and isinstance(value, tuple(getattr(datasets, k) for k in kinds))


def _is_model(value: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(value, transformers.PreTrainedModel)


def _kind(value: Any) -> str:
    return type(value).__name__
