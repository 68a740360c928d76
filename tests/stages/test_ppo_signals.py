"""Signals that come where a PPO run is in the middle of something, in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from align.rollout import sampler
from align.types import Interrupted

Row = dict[str, Any]
RunPPO = Callable[..., Path]


def kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool = False
) -> None:
    """Send SIGTERM to this process before or after the call-th call (from 1) of a function."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call
        if now and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        found = original(*args, **options)
        if now and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_while_an_adapter_is_switched_every_trained_tensor_is_saved(
    run_ppo: RunPPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Peft takes requires_grad from adapters that are off, and bf16 gives it to frozen weights."""
    options = ("lora.r=4", f"precision={precision}", "data.test_fraction=0", "ppo.iterations=1")
    whole = run_ppo("whole", *options, "train.save_every=1")
    sample = sampler._Sampler.run

    def sampling(*args: Any) -> None:
        sample(*args)
        kill_at(patch, torch.nn.Parameter, "requires_grad_", 5, after=True)

    with monkeypatch.context() as patch:
        if precision == "fp32":
            kill_at(patch, BaseTunerLayer, "enable_adapters", 20, after=True)
        else:
            patch.setattr(sampler._Sampler, "run", sampling)
        with pytest.raises(Interrupted) as caught:
            run_ppo("run", *options)
    assert caught.value.number == signal.SIGTERM
    names = {}
    for folder, step in ((whole, 1), (tmp_path / "run", 0)):
        names[step] = set(load_file(folder / f"checkpoints/step-{step}/actor.safetensors"))
    assert names[0] == names[1]
    run_ppo("run", *options, "resume=auto")
