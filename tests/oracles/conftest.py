"""The toy reference, gradients as the optimizer sees them, and plots of the way to an optimum."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracles.language import save_tabular

PLOTS = Path(__file__).parents[2] / "docs" / "oracles"

Curve = tuple[Sequence[float], Sequence[float]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tabular model that every run starts from."""
    return save_tabular(tmp_path_factory.mktemp("oracles") / "reference")


@pytest.fixture
def first_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[torch.Tensor]]:
    """``seen = first_gradients(module)``: of the first parameter at each step, one optimizer first.

    What ``module.make_optimizer`` makes is what is watched: the gradient that the step is made of.
    """

    def spy(module: Any) -> list[torch.Tensor]:
        original, seen = module.make_optimizer, []

        def spied(*args: Any, **options: Any) -> Any:
            optimizer = original(*args, **options)
            parameter = optimizer.param_groups[0]["params"][0]
            optimizer.register_step_pre_hook(lambda *_: seen.append(parameter.grad.clone()))
            return optimizer

        monkeypatch.setattr(module, "make_optimizer", spied)
        return seen

    return spy


@pytest.fixture
def plot() -> Callable[..., None]:
    """``plot("name", curves, bound=1, x="", y="", title="")``; drawn by `make oracles` only."""

    def draw(
        name: str,
        curves: Mapping[str, Curve],
        *,
        x: str,
        y: str,
        title: str,
        bound: float | None = None,
        log: bool = True,
        points: bool = False,
    ) -> None:
        if not os.environ.get("ALIGN_TRUST"):
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
        for label, (at, values) in curves.items():
            axes.plot(at, values, "o" if points else "-", markersize=4, label=label)
        if bound is not None:
            axes.axhline(
                bound, color="black", linewidth=1, linestyle="--", label=f"bound {bound:g}"
            )
        axes.set(xlabel=x, ylabel=y, title=title, yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right" if log else "best", fontsize=8)
        PLOTS.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOTS / f"{name}.png", dpi=90)
        plt.close(figure)

    return draw
