"""What both sides start from: one policy, one reward model, the same rows in the same order.

``python -m benchmarks.prepare MODEL FOLDER PLAN.json`` in the environment of `align`. The files
``*.jsonl`` are in the order of `align`'s data, ``*.peer.jsonl`` in the order of its steps, which is
the order that a peer reads them in. ``prepared.json`` says how many tokens each step has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.order import epoch_order, minibatches
from align.data.tokens.chat import encode_examples
from align.models import load_tokenizer
from align.models.load import load_causal_lm, load_classifier
from benchmarks.data import preference_rows, write_jsonl

SEED = 0
COLUMNS = {
    "sft": {"prompt": "prompt", "completion": "chosen"},
    "pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "prompts": {"prompt": "prompt"},
}


def save_models(model: str, folder: Path) -> None:
    """Both models with one tokenizer, whose padding is no end token on either side."""
    if (folder / "reward" / "config.json").is_file():
        return
    tokenizer = load_tokenizer(model)
    torch.manual_seed(SEED)
    for name, loaded in (
        ("policy", load_causal_lm(model, tokenizer)),
        ("reward", load_classifier(model, tokenizer)[0]),
    ):
        loaded.save_pretrained(str(folder / name))
        tokenizer.save_pretrained(str(folder / name))


def write_rows(folder: Path, name: str, batch: int, steps: int) -> list[tuple[int, int]]:
    """Rows of one kind; returns (tokens, counted tokens) of every step.

    Tokens are what has to go through the model at least: a prompt that two replies share, once.
    """
    kind = "preference" if name.startswith("pairs") else "sft"
    columns = COLUMNS["pairs" if kind == "preference" else "sft"]
    tokenizer = load_tokenizer(str(folder / "policy"))
    rows = [
        {ours: row[theirs] for ours, theirs in columns.items()}
        for row in preference_rows(tokenizer, batch * steps, seed=SEED)
    ]
    path = folder / f"{name}.jsonl"
    write_jsonl(path, rows)
    shuffled = epoch_order("shuffled", np.zeros(len(rows)), SEED)
    order = list(minibatches(len(rows), batch, shuffled, start=0, stop=steps))
    write_jsonl(folder / f"{name}.peer.jsonl", [rows[i] for step in order for i in step])
    loaded = load_examples([DataSource(path=str(path))], kind=kind)
    groups, _, _ = encode_examples(tokenizer, loaded.examples, max_tokens=10**6)
    return [
        (sum(groups[i].num_tokens for i in step), sum(groups[i].num_counted for i in step))
        for step in order
    ]


def write_prompts(folder: Path, name: str, count: int) -> None:
    """The prompts of every PPO iteration: both sides sample from all of them each time."""
    tokenizer = load_tokenizer(str(folder / "policy"))
    rows = preference_rows(tokenizer, count, seed=SEED)
    write_jsonl(folder / f"{name}.jsonl", ({"prompt": row["prompt"]} for row in rows))


def main() -> None:
    model, folder, plan = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    save_models(model, folder)
    facts: dict[str, Any] = {}
    for name, (batch, steps) in plan.items():
        if name == "ppo":
            write_prompts(folder, name, batch)
        else:
            facts[name] = write_rows(folder, name, batch, steps)
    (folder / "prepared.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
