"""Write the output files of commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from align.base.files import write_whole


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """Write JSONL to a new file."""
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows), new=True)
