"""Peak memory of a run against what ``align check`` says beforehand, in processes of their own.

    python -m benchmarks.memory                    every case on random models: minutes
    python -m benchmarks.memory ppo-lora sft-full  these cases
    python -m benchmarks.memory --shape large      SmolLM2-135M's shape
    python -m benchmarks.memory --model FOLDER     a model of your own

The models are random Llamas with the tokenizer of ``models/tiny``, the rows are synthetic; memory
depends on shapes alone. Peak memory is the largest resident set of ``align STAGE``, as the kernel
reports it, libraries included. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704},
    "medium": {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1408},
    "large": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
}
VOCABULARY = {"small": 8192, "medium": 32000, "large": 49152}
HEADS = {"small": 4, "medium": 8, "large": 9}
WORDS = ("in", "the", "beginning", "god", "created", "heaven", "and", "earth")
TOKENIZER = Path(__file__).parents[1] / "models" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none = all")
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--model", type=Path, help="a folder, in place of a random model")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens_per_microbatch")
    parser.add_argument("--minibatch", type=int, default=64, help="rows or pairs of a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = args.model or _make_model(place / "model", args.shape)
        common = {"precision": args.precision, "tokens": args.tokens, "minibatch": args.minibatch}
        _write_rows(place)
        named = model.name if args.model else args.shape
        print(f"| {named} | estimate, MB | measured, MB | estimate / measured |")
        print("|---|---|---|---|")
        for name in args.cases or CASES:
            recipe = _recipe(name, place, model, **common)
            estimate = _estimate(recipe)
            measured = _measure(recipe)
            print(f"| {name} | {estimate:.0f} | {measured:.0f} | {estimate / measured:.2f} |")
            sys.stdout.flush()


LORA = {"r": 16, "alpha": 32}
CASES: dict[str, dict[str, Any]] = {
    "sft-full": {},
    "sft-lora": {"lora": LORA},
    "sft-checkpointing": {"gradient_checkpointing": True},
    "rm-full": {},
    "rm-lora": {"lora": LORA},
    "dpo-full": {"dpo": {"reference": "online"}},
    "dpo-cached": {"dpo": {"reference": "cached"}},
    "dpo-lora": {"lora": LORA, "dpo": {"reference": "adapter_off"}},
    "ppo-full": {},
    "ppo-lora": {"lora": LORA},
}
"""``rm-lora`` comes before ``ppo-lora``, whose reward model it makes."""


def _make_model(folder: Path, shape: str) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY[shape],
        num_attention_heads=HEADS[shape],
        num_key_value_heads=HEADS[shape],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_rows(place: Path) -> None:
    rng = random.Random(0)

    def words(mean: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(mean // 2, mean * 3 // 2)))

    rows = [
        {"prompt": words(60), "chosen": words(40), "rejected": words(40), "references": [words(9)]}
        for _ in range(256)
    ]
    demonstrations = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    for name, content in (("rows", rows), ("demonstrations", demonstrations)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _recipe(
    name: str, place: Path, model: Path, *, tokens: int, precision: str, minibatch: int
) -> Path:
    stage, _, kind = name.partition("-")
    data = "demonstrations" if stage == "sft" else "rows"
    tree: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(place / name),
        "overwrite": True,
        "precision": precision,
        "data": {"train": str(place / f"{data}.jsonl"), "test_fraction": 0},
        **CASES[name],
    }
    if stage == "ppo":
        reward = place / f"rm-{kind}" / "model"
        if not reward.is_dir():
            common = {"tokens": tokens, "precision": precision, "minibatch": minibatch}
            _measure(_recipe(f"rm-{kind}", place, model, **common))
        tree |= {
            "reward": {"model": str(reward)},
            "ppo": {"iterations": 2, "rollout_batch": minibatch, "epochs": 1},
            "generation": {"max_new_tokens": 48, "samples_per_prompt": 4},
            "train": {"tokens_per_microbatch": tokens},
        }
    else:
        tree["train"] = {"max_steps": 2, "minibatch": minibatch, "tokens_per_microbatch": tokens}
    path = place / f"{name}_{stage}.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def _stage(recipe: Path) -> str:
    return recipe.stem.rpartition("_")[2]


def _estimate(recipe: Path) -> float:
    command = [sys.executable, "-m", "align", "check", str(recipe), "--stage", _stage(recipe)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^memory .*?([\d.]+) GB", out, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"`align check` printed no estimate:\n{out}")
    return float(found[1]) * 1000


def _measure(recipe: Path) -> float:
    """MB of the largest resident set of the stage's process."""
    command = [sys.executable, "-m", "align", _stage(recipe), str(recipe)]
    log = recipe.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    shutil.rmtree(recipe.parent / "checkpoints", ignore_errors=True)
    return usage.ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
