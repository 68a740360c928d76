"""Files, hub data sets or rows in memory -> records -> token groups -> token batches.

What ``__all__`` names is public, and imported when it is first used; docs/python.md lists it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config.sections import DataSource
    from align.data.examples import load_examples, split_by_prompt
    from align.data.readers.objects import given
    from align.data.tokens.chat import encode_examples
    from align.data.tokens.packing import collate, pack
    from align.types import PreferencePair, PromptExample, SFTExample, TokenBatch, TokenGroup

__all__ = [
    "DataSource",
    "PreferencePair",
    "PromptExample",
    "SFTExample",
    "TokenBatch",
    "TokenGroup",
    "collate",
    "encode_examples",
    "given",
    "load_examples",
    "pack",
    "split_by_prompt",
]

# name -> its module; a record is one of align.types
FOUND_IN = {
    "DataSource": "align.config.sections",
    "collate": "align.data.tokens.packing",
    "encode_examples": "align.data.tokens.chat",
    "given": "align.data.readers.objects",
    "load_examples": "align.data.examples",
    "pack": "align.data.tokens.packing",
    "split_by_prompt": "align.data.examples",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'align.data' has no attribute {name!r}")
    return getattr(importlib.import_module(FOUND_IN.get(name, "align.types")), name)
