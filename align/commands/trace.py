"""``align data trace RUN``: list the rows that a run, or one step of it, was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.base.console import say
from align.base.files import load_text, read_logged, reading
from align.base.progress import warn
from align.run.files import MANIFEST, NONFINITE, read_manifest
from align.stages import names_of
from align.types import AlignError


def add_parser(actions: Any) -> None:
    trace = actions.add_parser("trace", help="file and line of the rows that a run trains on")
    trace.add_argument("folder", metavar="RUN", help="the folder of an sft, rm, dpo or ppo run")
    trace.add_argument("--step", type=int, help="an optimizer step, of PPO an iteration, from 1")
    trace.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    trace.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    ids, lengths, manifest = read_trained_rows(folder)
    members = list(range(len(ids)))
    if args.step is not None:
        _require_done(folder, args.step)
        with reading(f"data trace: {folder / MANIFEST}"):
            members = members_of(manifest, lengths, args.step)
    if args.json:
        say(json.dumps([ids[i] for i in members], ensure_ascii=False))
        return
    for i in members:
        say(ids[i])


def read_trained_rows(folder: Path) -> tuple[list[str], list[int], dict[str, Any]]:
    """Read (ids, tokens, manifest); an id is ``file:line``, with ``#2`` for a second copy."""
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(folder)
        with reading(folder / "train_rows.tsv"):
            lines = load_text(folder / "train_rows.tsv").split("\n")[:-1]
            rows = [line.rsplit("\t", 1) for line in lines]
            return [row[0] for row in rows], [int(row[1]) for row in rows], manifest
    except AlignError as error:
        if "stream" in manifest:
            raise AlignError(
                f"data trace: {folder}: its rows were streamed (data.streaming=true), and no list "
                "of them is kept; without streaming there is one"
            ) from error
        raise AlignError(
            f"data trace: {folder} holds no run whose rows can be traced: {error}; name "
            "the folder of an sft, rm, dpo or ppo run"
        ) from error


def _require_done(folder: Path, step: int) -> None:
    """Refuse a step that the run has not done; warn about one that was skipped."""
    logged = read_logged(folder / "metrics.jsonl")
    done = int(max((row.get("step", 0) for row in logged), default=0))
    if not 1 <= step <= done:
        raise AlignError(f"data trace: --step {step}: the run has logged steps 1 to {done}")
    if step in {row.get("step") for row in read_logged(folder / NONFINITE)}:
        warn(f"data trace: step {step} was skipped, or a part of it: see {folder / NONFINITE}")


def members_of(manifest: dict[str, Any], lengths: list[int], step: int) -> list[int]:
    """Compute the rows of one step, as the run did."""
    from align.data.order import epoch_order, minibatches, prompt_batch

    recipe = manifest["recipe"]
    if manifest["stage"] not in names_of(lambda stage: stage.trains):
        raise AlignError(f"data trace: --step: a run of {manifest['stage']} has no steps")
    order = epoch_order(recipe.get("data.order", "shuffled"), lengths, manifest["seed"])
    if manifest["stage"] == "ppo":
        k = recipe["generation.samples_per_prompt"]
        return prompt_batch(len(lengths), recipe["ppo.rollout_batch"] // k, order, step - 1)
    size = recipe["train.minibatch"]
    (members,) = minibatches(len(lengths), size, order, start=step - 1, stop=step)
    return members
