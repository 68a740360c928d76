"""How the cost of a token grows: with sequence length, batch, vocabulary; and a start with pairs.

`align` alone, through its command line. The first three train SmolLM2's shapes from random weights,
fewer layers of them in the short form, on rows of real text; the last is `benchmarks.starts`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from align.models import load_tokenizer
from benchmarks import align_stage
from benchmarks.data import preference_rows, write_jsonl
from benchmarks.measure import Job, main
from benchmarks.starts import starts


def measure(job: Job) -> dict[str, Any]:
    """A point: starts with so many pairs, or steps of SFT on rows and a model of a shape."""
    value = job.settings["value"]
    if job.stage == "rm":
        found = starts(Path(job.folder), value)
        return {**found, "value": value, "peak_gib": max(found["gib"])}
    model = _shaped(job)
    rows = preference_rows(
        load_tokenizer(model), job.batch * job.steps, seed=1, length=job.settings["length"]
    )
    data = Path(job.folder, "rows.jsonl")
    write_jsonl(data, ({"prompt": r["prompt"], "completion": r["chosen"]} for r in rows))
    settings = {
        "train.tokens_per_microbatch": job.settings["microbatch"],
        "from_scratch": "true",
    }
    found = align_stage.measure(
        dataclasses.replace(job, model=model, data=str(data), settings=settings)
    )
    return {**found, "value": value}


def _shaped(job: Job) -> str:
    """A folder with the model's config, changed, and its tokenizer: weights are made anew."""
    folder = Path(job.folder, "model")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(job.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = job.settings["layers"] or config["num_hidden_layers"]
    config["vocab_size"] = job.settings["vocabulary"] or config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    main(measure)
