"""SHA-256 sums of a checkpoint's files, so that a changed bit is found and named.

A folder's sums are in ``SHA256SUMS``, in the format of ``sha256sum -c``. A single tensor file has
its sum in its own header, so that both change in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from align.base.files import Unreadable, fsync, load_text, move_into_place, parse_object
from align.base.hashing import sha256_of

SUMS = "SHA256SUMS"
HASHERS = 8
"""Files hashed in parallel; ``hashlib`` releases the GIL."""


@contextmanager
def summing(folder: Path) -> Iterator[Callable[[str], None]]:
    """Write the sums of a folder's files on exit, and force them to disk.

    A file is hashed on a thread as soon as its name is added, while the next one is written.
    """
    sums: dict[str, Future[Any]] = {}
    with ThreadPoolExecutor(HASHERS) as pool:

        def add(name: str) -> None:
            sums[name] = pool.submit(sha256_of, folder / name)

        yield add
        lines = [f"{sums[name].result().hexdigest()}  {name}\n" for name in sorted(sums)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    fsync(folder / SUMS)


def check_sums(folder: Path, names: Collection[str], *, only: Collection[str] = ()) -> bool:
    """Check a folder's sums; False if it has none.

    Args:
        names: Files that must be listed.
        only: Files to hash; all by default.

    Raises:
        Unreadable: A file is missing or has changed; the reason names it.
    """
    if not os.path.lexists(folder / SUMS):
        return False
    try:
        *lines, end = load_text(folder / SUMS).split("\n")
        sums = dict(map(_parsed, [*lines, end] if end else lines))
    except Unreadable as error:
        raise Unreadable(f"{SUMS}: {error}") from error
    for name in names:
        if name not in sums:
            raise Unreadable(f"{SUMS}: does not list {name}")
    named = list(only or sums)
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, found in zip(named, pool.map(partial(_hex_of, folder), named), strict=True):
            if found != sums[name]:
                raise Unreadable(f"{name}: its content has changed since it was saved (sha256)")
    return True


def _hex_of(folder: Path, name: str) -> str:
    try:
        return str(sha256_of(folder / name).hexdigest())
    except OSError as error:
        raise Unreadable(f"{name}: {error.strerror}") from error


def _parsed(line: str) -> tuple[str, str]:
    found = re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line)
    if not found:
        raise Unreadable("not lines of sums and names")
    return found[2], found[1]


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, state: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and JSON values atomically, with their sum; raises OSError or
    SafetensorError.
    """
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    values = dict(state or {})
    # one key, because safetensors orders several at random, and equal content should be equal bytes
    text = json.dumps({**values, "sha256": _sum(held, json.dumps(values))})
    # a random name: two machines may write the same entry with equal process ids
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        save_file(held, beside, {"state": text})
        fsync(beside)
        move_into_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load tensors and values of `save_tensors`, and check their sum if there is one.

    Raises:
        OSError, SafetensorError, ValueError: It is missing, damaged, or something else.
    """
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    state = parse_object(metadata.get("state", "{}"))
    expected = state.pop("sha256", None)
    if expected not in (None, _sum(held, json.dumps(state))):
        raise Unreadable("its content has changed since it was saved (sha256)")
    return held, state


def _sum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
