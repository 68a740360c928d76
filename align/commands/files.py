"""Files that commands write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from align.types import AlignError


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """JSONL, only where nothing lies yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise AlignError(f"{path}: exists already; name another file, or remove it") from None
