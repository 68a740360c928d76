"""A reward model from Python: pairs as a `datasets.Dataset`, scores by plain transformers.

    python examples/reward_model.py [FOLDER]      about ten seconds on a CPU

The pairs prefer a verse in modern English to the same verse in its old one.
"""

import json
import sys
from pathlib import Path

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import align

ROOT = Path(__file__).parents[1]


def main(folder: str = "runs/examples/rm") -> None:
    lines = (ROOT / "data/kjv_web/dev.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:100]]
    pairs = datasets.Dataset.from_list(
        [
            {"prompt": r["prompt"], "chosen": r["references"][0], "rejected": r["source_text"]}
            for r in rows
            if r["references"][0] != r["source_text"]  # two equal answers are no pair
        ]
    )
    run = align.reward_model(
        model=ROOT / "models/tiny",
        data={"train": pairs, "test_fraction": 0.2},
        train={"max_steps": 8, "minibatch": 8},
        optim={"lr": 1e-3},
        output_dir=folder,
        overwrite=True,
    )
    print(f"held-out accuracy {run.held_out['accuracy']:.2f}")

    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    text = rows[0]["prompt"] + rows[0]["references"][0] + tokenizer.eos_token
    score = model(**tokenizer(text, return_tensors="pt")).logits.item()
    print(f"score of one answer {score:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
