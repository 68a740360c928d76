"""Versions of the libraries, and the hardware, for a run's manifest."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "sacrebleu")


@functools.cache
def versions() -> Mapping[str, str]:
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
