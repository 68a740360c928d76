"""One measurement of TRL 1.12's PPO, the last release that had it.

Runs in an environment of its own. Its losses cannot be compared with `align`'s, because the two
sample different responses: compared are time and memory for the same prompts, the same number of
episodes and the same longest response.
"""

from __future__ import annotations

from typing import Any

import datasets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.measure import Job, main
from benchmarks.trl_stage import TickAtEachStep


def options(job: Job) -> PPOConfig:
    microbatch = job.settings.get("microbatch", job.batch)
    return PPOConfig(
        output_dir=f"{job.folder}/run",
        total_episodes=job.batch * job.steps,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=job.batch // microbatch,
        local_rollout_forward_batch_size=job.settings.get("rollout_forward", job.batch),
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=job.response_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=job.settings.get("bf16", False),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def measure(job: Job) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    rows = datasets.load_dataset(
        "json", data_files=job.data, split="train", cache_dir=f"{job.folder}/cache"
    )
    rows = rows.map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]
    )

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            job.reward_model, num_labels=1, dtype="float32"
        )

    callback = TickAtEachStep()
    trainer = PPOTrainer(
        args=options(job),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
        ref_model=None,
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss/policy_avg" in line]
    return {
        **callback.clock.durations(),
        "losses": [line["loss/policy_avg"] for line in logged],
        "metrics": logged[-1],
    }


if __name__ == "__main__":
    main(measure)
