"""Is a hub id there? One question with a bound of a few seconds, before the libraries ask.

They ask with retries: for nearly a minute, where there is no network. Only a definite no is an
error here: no such id, no access, no connection (refused, no route, none within `CONNECT_SECONDS`).
Where the hub answers slowly or not well, or breaks a connection off, they go on as ever; where
nothing has come within `PATIENCE_SECONDS`, so they do after a warning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from queue import Empty, Queue
from threading import Thread
from typing import Literal

from align.base.progress import warn
from align.types import AlignError

CONNECT_SECONDS = 5.0
"""To connect, and then to answer."""
PATIENCE_SECONDS = 12.0
"""For all of it: the time in which a name is resolved has no bound of its own. Then we go on."""
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}
"""Errors by their names: the library under huggingface_hub is not always the same."""
BROKEN_OFF = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""Somebody was there, though these, or what a library makes of them, are named ConnectionError."""


@functools.cache
def require_on_the_hub(name: str, kind: Literal["model", "dataset"], file: str) -> None:
    """Refuse a name that the hub does not have, or that cannot be asked for; once for each name.

    Args:
        name: ``org/name``; nothing of it in the hub's cache.
        kind: What it is a name of.
        file: A file that is asked for; that it is missing is no error.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    answers: Queue[Exception | None] = Queue()
    Thread(target=lambda: answers.put(_ask(name, kind, file)), daemon=True).start()
    try:
        error = answers.get(timeout=PATIENCE_SECONDS)
    except Empty:
        warn(
            f"{name}: no answer from the hub within {PATIENCE_SECONDS:g} s; asking on (with "
            "HF_HUB_OFFLINE=1 only what the hub's cache holds is used)"
        )
        return
    reason = None if error is None else _definite_no(error)
    if reason:
        key = {"model": "model", "dataset": "data"}[kind]
        raise AlignError(f"{key}: {name}: no such folder here, and {reason}") from error


def _ask(name: str, kind: str, file: str) -> Exception | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=CONNECT_SECONDS)
    except Exception as error:  # of any library under huggingface_hub
        return error
    return None


def _definite_no(error: Exception) -> str:
    """What to tell the user, or nothing where asking again may help."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return "gated on the hub: ask for access on its page, then set HF_TOKEN"
    if "RepositoryNotFoundError" in names:
        return "the hub has no such id (if it is private, set HF_TOKEN); correct it"
    if names & UNREACHABLE and not any(isinstance(e, BROKEN_OFF) for e in _chain(error)):
        said = " ".join(str(error).split())[:120]
        return (
            f"the hub cannot be reached ({said}); give a local folder, or set HF_HUB_OFFLINE=1 to "
            "use only what the hub's cache holds"
        )
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
