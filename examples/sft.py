"""SFT from Python: fine-tune a small model on rows that are in memory.

python examples/sft.py [FOLDER]      about ten seconds on a CPU; the run lies in FOLDER
"""

import json
import sys
from pathlib import Path

import align

ROOT = Path(__file__).parents[1]


def main(folder: str = "runs/examples/sft") -> None:
    lines = (ROOT / "data/kjv_web/sft.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:120]]  # mappings with prompt and completion
    run = align.sft(
        model=ROOT / "models/tiny",
        data={"train": rows, "test_fraction": 0.2, "max_tokens": 256},
        train={"max_steps": 8, "minibatch": 8},
        optim={"lr": 1e-3},
        output_dir=folder,
        overwrite=True,
    )
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    print(f"training loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"held-out perplexity {run.held_out['perplexity']:.1f}; the model is in {run.model}")


if __name__ == "__main__":
    main(*sys.argv[1:])
