"""Reward against KL of several models, as in the controlled-sentiment figure of the DPO paper.

    python tools/frontier.py runs/sentiment/frontier.png runs/sentiment/eval_reward/eval.json ...

Each ``eval.json`` is one panel: the mean reward of its models (with its 95% interval) over their KL
to the reference. Source of the idea: Rafailov et al. 2023, figure 2 (arXiv:2305.18290).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(out: Path, files: list[Path]) -> None:
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        for row in json.loads(file.read_text(encoding="utf-8"))["models"]:
            mean, (low, high) = row["reward_mean"], row["reward_ci95"]
            axis.errorbar(
                row["kl"], mean, yerr=[[mean - low], [high - mean]], marker="o", capsize=3
            )
            axis.annotate(
                row["name"],
                (row["kl"], mean),
                xytext=(4, 4),
                textcoords="offset points",
            )
        axis.margins(x=0.15)
        axis.set_xlabel("KL to SFT, nats per response")
        axis.set_ylabel(f"mean reward ({file.parent.name})")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
