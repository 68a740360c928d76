"""One measurement of TRL 1.16: SFT, reward model or DPO, by its own trainers.

Runs in TRL's environment. Rows come in the order of `align`'s steps, dropout is off, the learning
rate constant, and a step's gradient is that of the same minibatch, so losses can be compared.
"""

from __future__ import annotations

from typing import Any

import datasets
import transformers
import trl

from benchmarks.measure import Clock, Job, main

STAGES = {
    "sft": (trl.SFTConfig, trl.SFTTrainer),
    "rm": (trl.RewardConfig, trl.RewardTrainer),
    "dpo": (trl.DPOConfig, trl.DPOTrainer),
    "dpo_cached": (trl.DPOConfig, trl.DPOTrainer),
}


class TickAtEachStep(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick()


def options(job: Job) -> dict[str, Any]:
    """What every trainer is told; `job.settings` has the settings that were found fastest."""
    microbatch = job.settings.get("microbatch", job.batch)
    made: dict[str, Any] = {
        "output_dir": f"{job.folder}/run",
        "max_steps": job.steps,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": job.batch // microbatch,
        "train_sampling_strategy": "sequential",
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "max_length": None,
        "gradient_checkpointing": job.settings.get("checkpointing", False),
        "bf16": job.settings.get("bf16", False),
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if job.stage == "sft":
        made["padding_free"] = job.settings.get("padding_free", False)
    if job.stage == "dpo_cached":
        made["precompute_ref_log_probs"] = True
    return made


def measure(job: Job) -> dict[str, Any]:
    config, trainer_class = STAGES[job.stage]
    model = job.reward_model if job.stage == "rm" else job.model
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = datasets.load_dataset(
        "json", data_files=job.data, split="train", cache_dir=f"{job.folder}/cache"
    )
    callback = TickAtEachStep()
    trainer = trainer_class(
        model=model,
        args=config(**options(job), model_init_kwargs={"dtype": "float32"}),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {
        **callback.clock.durations(),
        "losses": [line["loss"] for line in logged],
        "metrics": logged[-1],
    }


if __name__ == "__main__":
    main(measure)
