"""Set up torch, oneDNN, glibc and Hugging Face's libraries before their import."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings

# huge pages for tensors on a CPU: a tenth of a training step is page faults without them
FAST = {"THP_MEM_ALLOC_ENABLE": "1"}
# oneDNN caches a compiled product for each of the last 1,024 shapes, and in bf16 a microbatch has
# some 20 of its own: 7 MB each time, scattered among the activations, whose memory is fragmented.
# The cache must hold those of one layer of a microbatch, 7 for each length of its segments: with
# 64, 14 preference pairs took 1.2 times as long; 256 cost nothing
LEAN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}
# no telemetry, no warnings about forks, no progress bars but our own
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # the default of bars that do not set `disable`; ours do
    "HF_HUB_VERBOSITY": "error",
}


def set_up(*, quiet: bool) -> None:
    """Set the variables that libraries read when they are imported; the user's own are kept.

    Args:
        quiet: Silence other libraries' lines and bars, as a command of ours does. In a user's own
            process they are the user's.
    """
    for name, value in {**FAST, **LEAN, **(QUIET if quiet else {})}.items():
        os.environ.setdefault(name, value)
    if quiet:
        ignore_warnings()
    keep_freed_memory()


def ignore_warnings() -> None:
    """Ignore FutureWarnings about transformers 6, which concern us, not the user."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system.

    Otherwise every step faults the same pages in again, which doubled its time on a virtual
    machine. Blocks above 32 MiB are still returned: keeping them gained nothing beside huge pages,
    and would leave holes of their size.
    """
    names = ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX", "TOP_PAD")
    theirs = ("GLIBC_TUNABLES", *(f"MALLOC_{name}_" for name in names))
    if platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in theirs):
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: bytes
