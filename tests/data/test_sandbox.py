"""A chat template that would not end, or would fill the memory, is refused in one line."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from align.data.tokens import sandbox, watchdog
from align.data.tokens.chat import encode_prompt
from align.types import AlignError

QUESTION = ({"role": "user", "content": "Who wept?"},)
CPU, SPACE, LENGTH = "processor time", "MiB of memory", "far more text"

LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "nested loops": (3 * LOOP + 3 * "{% endfor %}", CPU),
    "branching recursion": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        CPU,
    ),
    "a power": ("{{ (('1' * 4000) | int) ** 1000000 }}", CPU),
    "one multiplication": ("{{ 'a' * 10 ** 10 }}", SPACE),
    "two multiplications": ("{{ ('a' * 100000) * 100000 }}", SPACE),
    "a list": ("{% set _ = [messages] * 10 ** 10 %}", SPACE),
    "a width": ("{{ '%9999999999d' % 1 }}", SPACE),
    "a padded text": ("{{ 'a'.center(10 ** 10) }}", SPACE),
    "replacements": ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", SPACE),
    "an indent": ("{{ messages | tojson(indent=10 ** 10) }}", SPACE),
    "a growing namespace": (
        "{% set n = namespace(s='a') %}"
        "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        SPACE,
    ),
    "much text": (LOOP + "{{ messages[0].content }}{% endfor %}", LENGTH),
    "a large template": ("{{ messages }}" + " " * 1_000_000, "1,000,000 characters"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "MEMORY", 2**26)
    monkeypatch.setattr(sandbox, "_found", {})


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_one_line(make_tokenizer, kind: str) -> None:
    template, why = BOMBS[kind]
    with pytest.raises(AlignError, match=f"^the chat template is refused: .*{why}") as caught:
        encode_prompt(make_tokenizer(template=template), QUESTION)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("then", ["{% for j in range(99999) %}{% endfor %}", "{{ 'a' * 99999 }}"])
def test_a_bomb_that_waits_for_a_row_is_refused_at_that_row(chatml, then: str) -> None:
    """Its trial shows nothing; the bound on every rendering remains."""
    bomb = "{% if 'wept' in messages[0].content %}" + LOOP + then + "{% endfor %}{% endif %}"
    chatml.chat_template = bomb + chatml.chat_template
    assert len(encode_prompt(chatml, ({"role": "user", "content": "Who?"},)))
    with pytest.raises(
        AlignError, match=f"the chat template is refused: .*({CPU}|{LENGTH}|{SPACE})"
    ):
        encode_prompt(chatml, QUESTION)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_row_of_which_far_more_is_written_is_refused(chatml) -> None:
    bomb = "{% if 'wept' in messages[0].content %}{{ messages[0].content * 99999 }}{% endif %}"
    chatml.chat_template = bomb + chatml.chat_template
    with pytest.raises(AlignError, match=LENGTH):
        encode_prompt(chatml, QUESTION)


def test_a_template_is_tried_once(chatml, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(sandbox, "_tried", lambda render: tried.append(render) or "")
    for _ in range(3):
        encode_prompt(chatml, QUESTION)
    assert len(tried) == 1


def test_a_thread_renders_without_signals(chatml) -> None:
    """Only the main thread gets signals; a stream reads its rows in another."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(encode_prompt(chatml, QUESTION))))
    thread.start()
    thread.join()
    assert found == [len(encode_prompt(chatml, QUESTION))]


def in_child(file: Path, work: Callable[[], object]) -> tuple[int, str]:
    """Wait status of a child process that does some work, and what it wrote on stderr."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
            try:
                os.write(2, f"result: {work()}".encode())
            except AlignError as error:
                os.write(2, f"refused: {error}".encode())
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1], file.read_text()


ONE_CALL = (
    "{% set a = 'x' * 9000000 %}{% set b = 'x' * (9000000 * messages|length // 3) %}"
    "{{ [a] * 900000 == [b] * 900000 }}"
)


@pytest.mark.parametrize(
    ("bomb", "in_thread"),
    [(ONE_CALL, False), (ONE_CALL, True), (3 * LOOP + 3 * "{% endfor %}", True)],
    ids=["one call", "one call in a thread", "loops in a thread"],
)
def test_a_bomb_that_no_signal_stops_ends_the_run(
    chatml, tmp_path: Path, bomb: str, in_thread: bool
) -> None:
    """One call of C, and a thread's loop: the trial has no conversation of three turns."""
    chatml.chat_template = (
        f"{chatml.chat_template}{{% if messages|length == 3 %}}{bomb}{{% endif %}}"
    )
    assert len(encode_prompt(chatml, QUESTION))

    def work() -> None:
        watchdog.HANG_SECONDS = 0.5  # of the child's own watchdog, which it starts when it renders
        answer = {"role": "assistant", "content": "Jesus."}
        turns = (*QUESTION, answer, *QUESTION)
        if in_thread:
            thread = threading.Thread(target=encode_prompt, args=(chatml, turns))
            thread.start()
            thread.join(20)
        else:
            encode_prompt(chatml, turns)

    status, said = in_child(tmp_path / "stderr", work)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert "align: the run is ended: its chat template has rendered one conversation" in said


def test_many_short_renderings_are_no_hang(chatml, tmp_path: Path) -> None:
    def work() -> str:
        watchdog.HANG_SECONDS = 0.2
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            encode_prompt(chatml, QUESTION)
        return "whole"

    assert in_child(tmp_path / "stderr", work) == (0, "result: whole")


def test_a_trial_without_a_child_process_is_refused(chatml, monkeypatch) -> None:
    def fork() -> int:
        raise OSError("no more processes")

    line = "^the chat template could not be tried, so it is not used: no more processes; .*ulimit"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fork)
        with pytest.raises(AlignError, match=line):
            encode_prompt(chatml, QUESTION)
    assert len(encode_prompt(chatml, QUESTION))  # nothing bad is remembered of the template


def test_a_child_that_fails_before_it_renders_refuses(chatml, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(sandbox, "_lower", fail)
    with pytest.raises(AlignError, match=r"could not be tried, .*: ValueError: not allowed;"):
        encode_prompt(chatml, QUESTION)


def test_a_child_that_ends_without_a_word_refuses(chatml, monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "_render_trials", lambda render: os._exit(0))
    with pytest.raises(AlignError, match=r"could not be tried, .* exit status 0;"):
        encode_prompt(chatml, QUESTION)


def test_lower_limits_of_the_process_are_kept(make_tokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=BOMBS["nested loops"][0])

    def work() -> object:
        most = sandbox._virtual_memory() + 2**25
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return encode_prompt(tokenizer, QUESTION)

    status, said = in_child(tmp_path / "stderr", work)
    assert status == 0
    assert said.startswith("refused: the chat template is refused: it takes more than")


def test_launchers_may_ignore_ended_children(chatml, make_tokenizer) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert len(encode_prompt(chatml, QUESTION))
        with pytest.raises(AlignError, match=f"is refused: it ends the process .*{CPU}"):
            encode_prompt(make_tokenizer(template=BOMBS["nested loops"][0]), QUESTION)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_time_of_other_threads_is_not_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "_found", {"template": ""})
    busy = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"a", b"b", 900_000))

    def render(turns: object, open_turn: bool) -> str:
        busy.join()
        return "text"

    busy.start()  # without the interpreter's lock, as OpenMP's threads
    spent = time.process_time()
    assert sandbox.render_bounded("template", render, QUESTION, True) == "text"
    assert time.process_time() - spent > 0.1


def test_long_conversations_are_within_the_bound(chatml) -> None:
    turns = [{"role": r, "content": "x" * 20_000} for r in ("user", "assistant")] * 20
    assert len(encode_prompt(chatml, [*turns, *QUESTION])) > 10_000
