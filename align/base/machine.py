"""Versions of the libraries, and the hardware, for a run's manifest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "sacrebleu")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("align", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "gpus": gpus,
    }
