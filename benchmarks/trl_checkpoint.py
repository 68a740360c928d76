"""SFT of the tiny suite by TRL's own trainer: a checkpoint that another library made.

Runs in TRL's environment, started by `quality.py`, which reads the recipe's numbers. The order of
the rows is the trainer's own.
"""

from __future__ import annotations

import json
import sys

import datasets
import transformers
import trl


def main(model: str, data: str, output: str, settings: str) -> None:
    """``settings`` are arguments of ``SFTConfig``, as JSON."""
    rows = datasets.load_dataset(
        "json", data_files=data, split="train", cache_dir=f"{output}/cache"
    )
    config = trl.SFTConfig(
        output_dir=f"{output}/run",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
        **json.loads(settings),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{output}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
