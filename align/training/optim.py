"""AdamW and its schedule; the learning rate is a pure function of the step."""

from __future__ import annotations

import math

import torch

from align.config.sections import OptimOptions


def make_optimizer(
    model: torch.nn.Module, options: OptimOptions, *, lr: float | None = None
) -> torch.optim.AdamW:
    """Make AdamW over trainable parameters; norms and biases have no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr if lr is None else lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def lr_factor(
    step: int, total: int, *, schedule: str, warmup_fraction: float, final_lr_fraction: float
) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0) of ``total``.

    Linear warm-up whose last step is at the peak, then cosine or linear decay that reaches
    ``final_lr_fraction`` one step after the last, so that no step is wasted at 0.
    """
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_lr_fraction + (1 - final_lr_fraction) * shape


def set_lr(
    optimizer: torch.optim.Optimizer, peak: float, step: int, total: int, options: OptimOptions
) -> float:
    """Set and return the learning rate of one step."""
    lr = peak * lr_factor(
        step,
        total,
        schedule=options.schedule,
        warmup_fraction=options.warmup_fraction,
        final_lr_fraction=options.final_lr_fraction,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
