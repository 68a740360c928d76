"""Write a model card beside every saved model: data, recipe and results, in the hub's format.

``README.md`` starts with the hub's metadata, so that a folder can be pushed unchanged. Its facts
come from the manifest alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.base.console import one_line, printable
from align.base.files import write_whole

WHAT = {
    "sft": "fine-tuned on demonstrations",
    "rm": "trained as a Bradley-Terry reward model on preference pairs",
    "ppo": "optimised against a reward by PPO",
    "dpo": "optimised on preference pairs by DPO",
}
FOLDERS = ("model", "critic", "model_adapter", "critic_adapter")


def write_cards(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Write ``README.md`` into every model folder of a run; return the paths."""
    written = []
    for name in FOLDERS:
        place = folder / name
        if place.is_dir():
            path = place / "README.md"
            write_whole(path, model_card(name, folder, manifest))
            written.append(path)
    return written


def model_card(name: str, folder: Path, manifest: Mapping[str, Any]) -> str:
    """Write the card of one saved model.

    Args:
        name: Its folder inside the run's: ``model``, ``critic``, ...
        folder: The run's folder.
        manifest: Manifest of the finished run.

    Source: the hub's metadata format, https://huggingface.co/docs/hub/model-cards.
    """
    stage = str(manifest["stage"])
    recipe: Mapping[str, Any] = manifest.get("recipe", {})
    base = recipe.get("model")
    critic = name.startswith("critic")
    what = "the critic of a run of PPO" if critic else WHAT.get(stage, f"saved by align {stage}")
    title = f"{folder.parent.name}-{folder.name}" if folder.parent.name else folder.name
    results = {} if critic else manifest.get("held_out") or {}
    parts = [
        _metadata(name, title, stage, base, manifest, results),
        f"# {_text(title)}\n\n{_code(base)}, {what} by align.\n",
        "## Data\n\n" + _data(manifest),
    ]
    if results:
        rows = [f"| {_text(key)} | {value:.4g} |" for key, value in results.items()]
        table = "\n".join(["| held out, after training | |", "|---|---|", *rows])
        parts.append(f"## Results\n\n{table}\n\nEach number is explained in docs/metrics.md.\n")
    parts.append(f"## Recipe\n\n{_fenced(to_yaml(dict(recipe)))}\n")
    parts.append(f"## How it was made\n\n{_made(manifest)}\n")
    # control characters and lone surrogates in a name cannot be shown or written
    return printable("\n".join(parts))


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write one key a line, in order; values of any type are converted as for JSON."""
    plain = json.loads(json.dumps(values, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10**6)


def _text(text: object) -> str:
    """Escape a text for Markdown, in a line or in a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", one_line(str(text)))


def _code(text: object) -> str:
    """Make a code span, with more backticks around it than are in it."""
    text = one_line(str(text))
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _metadata(
    name: str,
    title: str,
    stage: str,
    base: Any,
    manifest: Mapping[str, Any],
    results: Mapping[str, float],
) -> str:
    """Write the YAML header; a base model in a local folder is no hub id, and is omitted."""
    from huggingface_hub import EvalResult, ModelCardData

    scored = stage == "rm" or name.startswith("critic")
    hub_id = base if isinstance(base, str) and _is_hub_id(base) else None
    data: Sequence[Mapping[str, Any]] = [
        report for reports in (manifest.get("data") or {}).values() for report in reports
    ]
    # a streamed file has a size instead of a sum
    sets = [r["path"].rpartition("/")[0] for r in data if not (r.get("sha256") or "bytes" in r)]
    held_out = [
        EvalResult(
            task_type="text-classification" if scored else "text-generation",
            dataset_type="held-out",
            dataset_name="rows held out by the run",
            metric_type=key,
            metric_value=round(float(value), 6),
        )
        for key, value in results.items()
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if scored else "text-generation",
        base_model=hub_id,
        datasets=list(dict.fromkeys(sets)) or None,
        tags=["align", stage],
        model_name=title if held_out else None,
        eval_results=held_out or None,
    )
    return f"---\n{card.to_yaml().strip()}\n---\n"


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not Path(model).exists() and not model.startswith((".", "/"))


def _data(manifest: Mapping[str, Any]) -> str:
    rows = ["| use | file | rows | sha256 |", "|---|---|---|---|"]
    for use, reports in (manifest.get("data") or {}).items():
        for report in reports:
            count = "streamed"
            if "rows_read" in report:
                count = f"{report['rows_kept']} of {report['rows_read']}"
            sha256 = (report.get("sha256") or "")[:16]
            path = _code(report["path"]).replace("|", "\\|")  # a bar ends a cell, even in code
            digest = _code(sha256) if sha256 else ""
            rows.append(f"| {_text(use)} | {path} | {count} | {digest} |")
    return "\n".join(rows) + "\n"


def _made(manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(_text(f"{k} {v}") for k, v in (manifest.get("versions") or {}).items())
    seconds = manifest.get("seconds")
    took = f" It took {seconds:.0f} s." if isinstance(seconds, int | float) else ""
    return f"{_code(manifest.get('command', ''))}, seed {manifest.get('seed')}; {versions}.{took}"
