"""Hash files in pieces, without what loading tensors needs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def sha256_of(path: Path, size: int | None = None) -> Any:
    """Hash a file, or its first ``size`` bytes; the hash can be updated further."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    left = os.path.getsize(path) if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (count := file.readinto(buffer[: min(CHUNK, left)])):
            digest.update(buffer[:count])
            left -= count
    return digest
