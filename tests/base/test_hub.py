"""A hub id that cannot be fetched is told in seconds; a slow or ill hub is left to retries."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from align.base import hub
from align.models import load_tokenizer
from align.models.locate import in_the_cache, require_found
from align.types import AlignError

Answer = Callable[[Exception | None], list[str]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """Have the hub answer so; returns the addresses that it is asked for."""

    def arrange(error: Exception | None) -> list[str]:
        asked: list[str] = []

        def metadata(url: str) -> None:
            asked.append(url)
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        return asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.require_on_the_hub.cache_clear()
    yield arrange
    hub.require_on_the_hub.cache_clear()


def named(name: str) -> Exception:
    """An error of a library that huggingface_hub may or may not stand on."""
    return type(name, (Exception,), {})("no\nroute")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "ConnectError",
            r"the hub cannot be reached \(no route\); give a local folder, or set HF_H",
        ),
        ("ConnectTimeout", "the hub cannot be reached"),
        ("RepositoryNotFoundError", r"the hub has no such id \(if it is private, set HF_TOKEN\)"),
        ("GatedRepoError", "gated on the hub: ask for access on its page, then set HF_TOKEN"),
    ],
)
def test_a_definite_no_is_one_line(answer: Answer, error: str, line: str) -> None:
    answer(named(error))
    with pytest.raises(AlignError, match=f"^model: org/m: no such folder here, and {line}") as got:
        load_tokenizer("org/m")
    assert "\n" not in str(got.value)


def reset(name: str | None) -> Exception:
    """A connection that was broken off, as a library tells it, or as it is."""
    bare = ConnectionResetError(104, "Connection reset by peer")
    if name is None:
        return bare
    try:
        try:
            raise bare
        except OSError as cause:
            raise named("ProtocolError") from cause
    except Exception:
        try:
            raise named(name)  # without a cause, as requests does it
        except Exception as error:
            return error


@pytest.mark.parametrize("name", [None, "ConnectionError", "ConnectError"])
def test_a_connection_that_breaks_off_is_no_definite_no(answer: Answer, name: str | None) -> None:
    asked = answer(reset(name))
    hub.require_on_the_hub("org/m", "model", "config.json")
    assert len(asked) == 1


def test_a_connection_that_is_refused_is_a_definite_no(answer: Answer) -> None:
    answer(ConnectionRefusedError(111, "Connection refused"))
    with pytest.raises(AlignError, match="the hub cannot be reached"):
        hub.require_on_the_hub("org/m", "model", "config.json")


@pytest.mark.parametrize("error", ["ReadTimeout", "EntryNotFoundError", "HfHubHTTPError", None])
def test_a_slow_or_ill_hub_is_left_to_the_libraries(answer: Answer, error: str | None) -> None:
    asked = answer(named(error) if error else None)
    for _ in range(2):
        hub.require_on_the_hub("org/m", "model", "config.json")
    assert asked == [f"{constants.ENDPOINT}/org/m/resolve/main/config.json"]


def test_a_question_is_bounded_by_the_time_out_of_the_hubs_library(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts and says nothing: no line, and the libraries ask on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}")
        soon = functools.partial(huggingface_hub.get_hf_file_metadata, timeout=0.2)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", soon)
        start = time.monotonic()
        hub.require_on_the_hub("org/d", "dataset", "README.md")
        assert time.monotonic() - start < 5
        silent.settimeout(5)
        silent.accept()[0].close()  # it was asked


def test_offline_nobody_is_asked(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(named("ConnectError"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.require_on_the_hub("org/m", "model", "config.json")
    assert asked == []


def test_what_the_cache_holds_is_not_asked_for(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(None)
    monkeypatch.setattr("align.models.locate.in_the_cache", lambda name: name == "org/kept")
    for name in ("org/kept", "org/new"):
        assert require_found(name) == (name, {"use_safetensors": True})
    assert [url for url in asked if "org/kept" in url] == []
    assert len(asked) == 1


def test_a_name_that_the_hub_forbids_is_in_no_cache() -> None:
    assert not in_the_cache("org/a..b")
