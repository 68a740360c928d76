"""``align sweep``: run one recipe over several values of a key, then print one table.

Each point is a run of its own in ``<output_dir>/<key>=<value>``. A point that is done is not run
again, and an interrupted one resumes from its newest checkpoint, so the same command restarts a
sweep that died.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from align.base.locks import held
from align.base.progress import say, table
from align.config.load import load_recipe
from align.run.files import MANIFEST, read_manifest
from align.stages import STAGES, Stage, recipe_classes, run_stage
from align.types import AlignError


def sweep(
    stage: Stage,
    recipe: str,
    overrides: Sequence[str],
    *,
    over: Sequence[str],
    evaluate: str | None,
) -> None:
    """Run every point, then the evaluation over all of them.

    Args:
        stage: Stage to sweep, such as ``STAGES["dpo"]``.
        recipe: A path or a shipped name.
        overrides: ``key=value`` for every point.
        over: ``key=a,b,c``; several keys make a grid.
        evaluate: An evaluation's recipe, whose models are compared with the sweep's, or None.
    """
    points = grid(over)
    # read every point before the first one runs: a mistake in the last would cost hours
    base = _load(stage, recipe, overrides)
    root = Path(base.output_dir)
    planned = []
    for point in points:
        folder = root / ",".join(point)
        own = [*overrides, *point, f"output_dir={folder}"]
        planned.append((folder, own))
        _load(stage, recipe, own)
    swept = {folder.name: str(folder / "model") for folder, _ in planned}
    evaluation = None
    if evaluate is not None:
        evaluation = _with_models(evaluate, swept, root / "eval")
    with held(root, "sweep"):  # two of them would run the same points
        for number, (folder, own) in enumerate(planned, start=1):
            say(f"sweep: {number} of {len(planned)}: {folder.name}")
            _run_point(stage, recipe, own, folder)
            gc.collect()
        say(table(_held_out([folder for folder, _ in planned]), title="\nsweep, held out"))
        if evaluation is not None:
            run_stage(STAGES["eval"], evaluation)
    say(f"sweep: done; `align report {root}` draws it")


def grid(over: Sequence[str]) -> list[list[str]]:
    """Make a grid: ``["a=1,2", "b=3"]`` -> ``[["a=1", "b=3"], ["a=2", "b=3"]]``."""
    axes = []
    for text in over:
        key, sign, values = text.partition("=")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not sign or not key or not listed:
            raise AlignError(f"--over {text!r}: wanted KEY=A,B,C, such as dpo.beta=0.05,0.1,0.3")
        if len(set(listed)) < len(listed):
            raise AlignError(f"--over {text!r}: names a value twice")
        if "/" in text:
            raise AlignError(f"--over {text!r}: a value names a folder here; it cannot hold a /")
        axes.append([f"{key}={value}" for value in listed])
    return [list(point) for point in product(*axes)]


def _held_out(folders: Sequence[Path]) -> list[list[str]]:
    """Make a row for each point and a column for each held-out number."""
    found = {f.name: _manifest(f).get("held_out") or {} for f in folders}
    keys = list(dict.fromkeys(key for numbers in found.values() for key in numbers))
    rows = [[n, *(f"{v[k]:.4g}" if k in v else "" for k in keys)] for n, v in found.items()]
    return [["point", *keys], *rows]


def _manifest(folder: Path) -> dict[str, Any]:
    return read_manifest(folder, "restore it, or remove the folder to run this point again")


def _run_point(
    stage: Stage,
    recipe: str,
    overrides: Sequence[str],
    folder: Path,
) -> None:
    planned = _load(stage, recipe, overrides)
    if not os.path.lexists(folder / MANIFEST):
        run_stage(stage, planned)
        return
    manifest = _manifest(folder)
    if manifest.get("status") == "done":
        _check_same(manifest, planned, folder)
        say(f"  done already: {folder}")
        return
    from align.training.checkpoint import checkpoints

    how = "resume=auto" if checkpoints(folder / "checkpoints") else "overwrite=true"
    run_stage(stage, _load(stage, recipe, [*overrides, how]))


def _check_same(manifest: Mapping[str, Any], planned: Any, folder: Path) -> None:
    """Refuse a finished point that was run with another recipe."""
    from align.config.load import to_yaml
    from align.run.identity import first_change, lasting, plain

    change = first_change(manifest.get("recipe", {}), plain(lasting(to_yaml(planned))))
    if change:
        key, was, is_now = change
        raise AlignError(
            f"sweep: {folder} was run with {key}={was}, and the recipe now says {is_now}; "
            "restore it, remove the folder, or name another output_dir"
        )


def _with_models(recipe: str, swept: dict[str, str], folder: Path) -> Any:
    """Load the evaluation's recipe with the sweep's models after its own."""
    own = _load(STAGES["eval"], recipe, [])
    models = {**own.models, **swept}
    # as JSON, because YAML may misread names and folders
    named = json.dumps(models, ensure_ascii=False)
    overrides = [f"models={named}", f"output_dir={folder}", "overwrite=true"]
    return _load(STAGES["eval"], recipe, overrides)


def _load(stage: Stage, recipe: str, overrides: Sequence[str]) -> Any:
    return load_recipe(stage.recipe, recipe, overrides, others=recipe_classes())
