"""RunResult: what a stage that was called from Python gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A finished run. Everything in it is read from ``folder``.

    Attributes:
        folder: The run's folder.
        model: The trained model's folder, which ``from_pretrained`` and every ``model=`` take;
            None for a run that trains none.
        held_out: Held-out numbers after training, as in the closing table. Of an evaluation
            ``model/number`` -> value.
    """

    folder: Path
    model: Path | None
    held_out: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``, oldest first; docs/metrics.md explains the keys."""
        return self._rows("metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Lines of ``samples.jsonl``, which PPO and generation write."""
        return self._rows("samples.jsonl")

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Lines of ``pairs.jsonl``, which generation with ``pairs`` writes."""
        return self._rows("pairs.jsonl")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The content of ``eval.json``; empty for a run that is no evaluation."""
        from align.base.files import read_json

        path = self.folder / "eval.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of ``manifest.json``."""
        from align.run.files import read_manifest

        return read_manifest(self.folder)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        from align.base.files import read_logged

        return read_logged(self.folder / name)


def result_of(folder: Path) -> RunResult:
    """Read a finished run's folder."""
    from align.run.files import read_manifest

    held_out = dict(read_manifest(folder).get("held_out") or {})
    model = folder / "model"
    result = RunResult(folder, model if model.is_dir() else None, held_out)
    for row in result.evaluation.get("models", ()):
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        held_out |= {f"{row['name']}/{key}": value for key, value in numbers.items()}
    return result
