"""Ask the hub once whether an id exists, before the libraries ask.

The libraries ask with retries, for nearly a minute without a network. Here one question has
huggingface_hub's own time-out (``HF_HUB_ETAG_TIMEOUT``, 10 seconds). Only a definite no is an
error: no such id, no access, no connection (refused, no route, no answer in time). If the hub
answers slowly or badly, or breaks a connection off, the libraries ask again as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

from align.types import AlignError

UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}
"""Names of connection errors: the HTTP library under huggingface_hub varies."""
BROKEN_OFF = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""Errors of a server that was reached, though libraries call them ConnectionError too."""


@functools.cache
def require_on_the_hub(name: str, kind: Literal["model", "dataset"], file: str) -> None:
    """Refuse a name that the hub does not have or does not answer for; asked once per name.

    Args:
        name: ``org/name``, not in the hub's cache.
        kind: Kind of the repository.
        file: A file to ask for; a missing file is no error.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))
    except Exception as error:  # any HTTP library's error
        reason = _definite_no(error)
        if reason:
            key = {"model": "model", "dataset": "data"}[kind]
            raise AlignError(f"{key}: {name}: no such folder here, and {reason}") from error


def _definite_no(error: Exception) -> str:
    """Return the line for the user; "" if asking again may help."""
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
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
