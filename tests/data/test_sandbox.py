"""A chat template that would not end, or would fill the memory, is refused in one line."""

from __future__ import annotations

import signal
import threading

import pytest

from align.data import sandbox
from align.data.chat import encode_prompt
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


def test_long_conversations_are_within_the_bound(chatml) -> None:
    turns = [{"role": r, "content": "x" * 20_000} for r in ("user", "assistant")] * 20
    assert len(encode_prompt(chatml, [*turns, *QUESTION])) > 10_000
