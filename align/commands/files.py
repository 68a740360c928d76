"""Files that commands write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from align.base.files import write_whole


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """JSONL, only where nothing lies yet."""
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows), new=True)
