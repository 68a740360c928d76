"""SFT of the tiny suite by TRL's own trainer: a checkpoint that another library made.

Runs in TRL's environment, started by `quality.py`. Data, minibatch, passes, schedule, peak learning
rate, weight decay and gradient norm are those of `recipes/tiny/sft.yaml`; the order of the rows is
the trainer's own.
"""

from __future__ import annotations

import sys

import datasets
import transformers
import trl


def main(model: str, data: str, output: str) -> None:
    rows = datasets.load_dataset(
        "json", data_files=data, split="train", cache_dir=f"{output}/cache"
    )
    config = trl.SFTConfig(
        output_dir=f"{output}/run",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all
        weight_decay=0.01,
        max_grad_norm=1.0,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=0,
        model_init_kwargs={"dtype": "float32"},
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
