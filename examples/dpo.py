"""DPO from Python: a model and a tokenizer that are loaded already, with an adapter (LoRA).

python examples/dpo.py [FOLDER]      about ten seconds on a CPU
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import align

ROOT = Path(__file__).parents[1]


def main(folder: str = "runs/examples/dpo") -> None:
    lines = (ROOT / "data/kjv_web/dev.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:100]]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["references"][0], "rejected": r["source_text"]}
        for r in rows
        if r["references"][0] != r["source_text"]  # two equal answers are no pair, and refused
    ]
    run = align.dpo(
        model=AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny"),
        tokenizer=AutoTokenizer.from_pretrained(ROOT / "models/tiny"),
        data={"train": pairs, "test_fraction": 0.2},
        dpo={"beta": 0.1},
        lora={"r": 8},
        train={"max_steps": 8, "minibatch": 8},
        optim={"lr": 1e-3},
        output_dir=folder,
        overwrite=True,
    )
    print(f"held-out accuracy {run.held_out['accuracy']:.2f}, loss {run.held_out['loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
