"""One measurement of `align`, through its command line: what a user's `align sft my.yaml` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align import cli
from align.run.folder import Run
from benchmarks.measure import Clock, Job, main

COMMANDS = {"sft": "sft", "rm": "rm", "dpo": "dpo", "dpo_cached": "dpo", "ppo": "ppo"}


def recipe(job: Job) -> dict[str, Any]:
    """The recipe with the peers' hyperparameters; speed settings are the defaults of `align`."""
    made: dict[str, Any] = {
        "model": job.reward_model if job.stage == "rm" else job.model,
        "output_dir": f"{job.folder}/run",
        "overwrite": True,
        "data": {"train": job.data, "test_fraction": 0, "max_tokens": 8192},
        "optim": {"lr": job.lr, "schedule": "constant", "warmup_fraction": 0},
    }
    if job.stage == "ppo":
        made |= {
            "reward": {"model": job.reward_model},
            "generation": {"max_new_tokens": job.response_tokens, "temperature": 1.0},
            "ppo": {
                "iterations": job.steps,
                "rollout_batch": job.batch,
                "epochs": 1,
                "missing_eos_score": None,
            },
        }
    else:
        made["train"] = {"minibatch": job.batch, "max_steps": job.steps}
    if job.stage.startswith("dpo"):
        made["dpo"] = {"reference": "cached" if job.stage == "dpo_cached" else "online"}
    if job.stage == "rm":
        made["reward_model"] = {"normalize": False}
    return made


def measure(job: Job) -> dict[str, Any]:
    path = Path(job.folder, "recipe.yaml")
    path.write_text(yaml.safe_dump(recipe(job)), encoding="utf-8")
    overrides = [f"{key}={value}" for key, value in job.settings.items()]
    clock = Clock()
    log = Run.log

    def log_and_tick(run: Run, step: int, metrics: Mapping[str, float]) -> None:
        log(run, step, metrics)
        if "tokens" in metrics:  # not of an evaluation
            clock.tick()

    Run.log = log_and_tick  # type: ignore[method-assign]
    if cli.main([COMMANDS[job.stage], str(path), *overrides, "--debug"]):
        raise SystemExit(f"align {job.stage} failed; see above")
    lines = Path(job.folder, "run", "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "tokens" in line]
    return {
        **clock.durations(),
        "losses": [line.get("loss", line.get("policy_loss")) for line in steps],
        "tokens": [line["tokens"] for line in steps],
        "first_step": steps[0]["seconds"],
        "metrics": steps[-1],
    }


if __name__ == "__main__":
    main(measure)
