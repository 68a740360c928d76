"""Render runs as one self-contained HTML page: no network, no second file.

The template escapes every text of a model, a user or a file; figures alone are markup, and
matplotlib escapes their text. A content security policy in the page's head allows its own script
only, and no request.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align import __version__
from align.base.console import printable
from align.base.files import BROKEN, reading, require_writable, write_whole
from align.base.page_policy import content_security_policy
from align.base.progress import duration
from align.evaluation.columns import columns
from align.evaluation.verdict import deciding_p
from align.report import figures
from align.report.frontier import frontier_of
from align.report.runs import NOT_OURS, RunRecord, find_runs, read_run
from align.report.samples import of_training, side_by_side
from align.report.verdicts import NAMES, verdicts
from align.run import doctor
from align.run.doctor_rules import Finding
from align.types import AlignError

# not drawn: they are progress, not quality
NO_CURVE = {"step", "seconds", "epoch", "tokens"}


def write_report(places: Sequence[str], output: str) -> Path:
    """Read the runs in ``places`` and write the page."""
    folders = find_runs(places)
    path = Path(output)
    if path.is_dir():
        path = path / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AlignError(f"report: {path}: {error.strerror}; name another --output") from error
    require_writable(path, "--output")
    root = Path(os.path.commonpath([f.resolve().parent for f in folders]))
    runs = [read_run(folder.resolve(), root) for folder in folders]
    write_whole(path, _rendered(runs))
    return path


def _rendered(runs: Sequence[RunRecord]) -> str:
    """Render the page; on damaged files, raise one line that names the run."""
    try:
        return render(runs)
    except BROKEN:
        for run in runs:
            files = "manifest.json, config.yaml, metrics.jsonl, eval.json or outputs"
            with reading(f"{run.folder} ({files})", NOT_OURS):
                render([run])
        raise


def render(runs: Sequence[RunRecord]) -> str:
    """Render the whole page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "signed": signed,
        "interval": interval,
        "deciding_p": deciding_p,
        "duration": lasted,
    }
    environment.filters |= filters
    script = environment.get_template("page.js").render()
    evaluations = [run for run in runs if run.evaluation is not None]
    page = environment.get_template("page.html.j2").render(
        script=Markup(script),
        policy=content_security_policy(f"<script>{script}</script>"),
        title=_title(runs),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        facts={run.name: _facts(run) for run in runs},
        verdicts=[v for run in evaluations for v in verdicts(run)],
        held_out=[run for run in runs if run.manifest.get("held_out")],
        findings=[(run.name, finding) for run in runs for finding in _findings(run)],
        evaluations=[_evaluation(run) for run in evaluations],
        rewards=[_reward(run) for run in evaluations if (run.evaluation or {}).get("reward_model")],
        curves=[(run.name, run.stage, drawn) for run in runs if (drawn := _curves(run))],
        samples=[found for run in evaluations if (found := side_by_side(run))],
        training_samples=[(r.name, rows) for r in runs if (rows := of_training(r))],
        names=NAMES,
    )
    # removes direction overrides, which would reverse a name in the page
    return printable(page)


def _findings(run: RunRecord) -> list[Finding]:
    """Diagnose the run from its logged numbers."""
    return doctor.diagnose(run.stage, run.metrics, run.manifest)


def _title(runs: Sequence[RunRecord]) -> str:
    parents = dict.fromkeys(run.folder.parent.name for run in runs)
    return ", ".join(parents) if len(parents) <= 2 else f"{len(runs)} runs"


def _facts(run: RunRecord) -> dict[str, Any]:
    """Collect models, data files and configuration of a run."""
    manifest = run.manifest
    files = [
        {
            "use": use,
            "path": report["path"],
            "sha256": (report.get("sha256") or "")[:12],
            # streamed rows are counted in the manifest's `stream`
            "kept": report.get("rows_kept"),
            "read": report.get("rows_read"),
        }
        for use, reports in (manifest.get("data") or {}).items()
        for report in reports
    ]
    models = run.config.get("models") or {"model": run.config.get("model")}
    return {
        "models": {name: model for name, model in models.items() if model},
        "files": files,
        "used": _used(manifest),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "manifest": json.dumps(
            {k: v for k, v in manifest.items() if k not in ("recipe", "data")},
            indent=2,
            ensure_ascii=False,
        ),
    }


def _used(manifest: dict[str, Any]) -> str:
    """Describe how many of the files' rows the run used."""
    if "train_rows" not in manifest:
        return ""
    held_out = manifest.get("test_rows")
    more = f", {held_out:,} held out" if held_out else ""
    streamed = "streamed so far" if "stream" in manifest else "used"
    return f"{manifest['train_rows']:,} rows {streamed}{more}"


def _evaluation(run: RunRecord) -> dict[str, Any]:
    found = run.evaluation or {}
    rows = list(found["models"])
    if found.get("copy_baseline"):
        rows = [{"name": "copy the input", **found["copy_baseline"]}, *rows]
    return {
        "name": run.name,
        "rows": rows,
        "columns": columns(rows, page=True),
        "comparisons": found.get("comparisons", []),
        "win_rates": found.get("win_rates", []),
        "pooled": found.get("pooled", []),
        "signatures": sorted({v for r in rows for k, v in r.items() if k.endswith("signature")}),
        "prompts": run.manifest.get("prompts"),
        "frontier": frontier_of(run),
    }


def _reward(run: RunRecord) -> dict[str, Any]:
    found = (run.evaluation or {})["reward_model"]
    return {
        "name": run.name,
        "found": found,
        "reliability": figures.reliability(
            f"Reliability of {found['reward']}: share right against confidence",
            found["reliability"],
        ),
        "gaps": figures.histogram(
            f"Margins of {found['reward']}: {found['accuracy']:.0%} of them right of 0",
            found["gaps"],
            xlabel="score(chosen) - score(rejected)",
            ylabel="pairs",
        ),
    }


def _curves(run: RunRecord) -> list[Any]:
    """Draw a small figure per logged number, training and held-out together if both exist."""
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    drawn = []
    for key in (k for k in keys if k not in NO_CURVE):
        if key.startswith("eval_") and key.removeprefix("eval_") in keys:
            continue
        lines = [figures.Line(key, *run.series(key), dots=key.startswith("eval_"))]
        if f"eval_{key}" in keys:
            lines.append(figures.Line("held out", *run.series(f"eval_{key}"), dots=True))
        lines = [line for line in lines if len(line.x) > 1]
        if lines:
            drawn.append((key, figures.curves(f"{run.name}: {key} by step", lines), lines))
    path = figures.Line("score_mean", run.series("kl")[1], run.series("score_mean")[1])
    if len(path.x) == len(path.y) > 1:  # reward per nat so far, on training prompts
        title = f"{run.name}: score_mean against kl, iteration by iteration"
        drawn.append(("score_mean by kl", figures.curves(title, [path], xlabel="kl"), [path]))
    return drawn


def number(value: Any) -> str:
    """Format with three significant digits, including zeros; "" for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)  # the file was edited by hand; the template escapes it
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1e-6:  # a KL of 0 with rounding error
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:,.0f}"


def signed(value: float) -> str:
    """Format a difference with its sign."""
    positive = isinstance(value, int | float) and value > 0
    return f"+{number(value)}" if positive else number(value)


def interval(pair: Any) -> str:
    return "" if pair is None else f"{number(pair[0])} to {number(pair[1])}"


def lasted(seconds: Any) -> str:
    return "" if seconds is None else duration(seconds)
