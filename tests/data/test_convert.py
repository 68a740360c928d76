"""Every format that can be written is read back as what it was, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.formats.columns import read_row
from align.data.inspect.convert import TARGETS, convert
from align.data.sources import Row
from align.types import AlignError, PreferencePair, PromptExample, SFTExample

words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@st.composite
def conversations(draw) -> PreferencePair:
    """A system turn or none, exchanges, and two different answers."""
    prompt = [turn("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [turn("user", draw(words)), turn("assistant", draw(words))]
    a, b = draw(st.lists(words, min_size=2, max_size=2, unique=True))
    return PreferencePair(
        id="f:1",
        prompt=(*prompt, turn("user", draw(words))),
        chosen=(turn("assistant", a),),
        rejected=(turn("assistant", b),),
        margin=draw(st.none() | st.floats(0, 9)),
        source="f",
    )


def back(row: dict, kind: str):
    (example,) = read_row(Row(row, "f:1"), kind, columns={}, source="f")
    return example


@pytest.mark.parametrize("target", ["messages", "conversations", "sharegpt", "hh", "alpaca"])
@given(pair=conversations())
def test_conversations_come_back(target: str, pair: PreferencePair) -> None:
    if target == "hh" and pair.prompt[0]["role"] == "system":
        with pytest.raises(AlignError, match="f:1: HH-RLHF has no system turn"):
            convert(pair, target)
        return
    assert back(convert(pair, target), "preference") == pair


@given(pair=conversations())
def test_a_conversation_is_no_single_string(pair: PreferencePair) -> None:
    if len(pair.prompt) > 1:
        with pytest.raises(AlignError, match="are no single string; use --to messages"):
            convert(pair, "strings")
        return
    row = convert(pair, "strings")
    assert (row["prompt"], row["chosen"]) == (pair.prompt[0]["content"], pair.chosen[0]["content"])


def test_what_turns_have_besides_words_is_kept_or_refused() -> None:
    thought = {**turn("assistant", "a"), "reasoning_content": "Hm.", "train": False}
    sft = SFTExample(id="f:1", messages=(turn("user", "q"), thought, turn("user", "r"), thought))
    kept = back(
        convert(replace(sft, messages=(*sft.messages, turn("assistant", "b"))), "sharegpt"), "sft"
    )
    assert kept.messages[1] == thought
    pair = PreferencePair(
        id="f:1", prompt=(turn("user", "q"),), chosen=(thought,), rejected=(turn("assistant", "b"),)
    )
    for target in ("strings", "hh", "alpaca"):
        with pytest.raises(AlignError, match="no place for reasoning_content, train of a turn"):
            convert(pair, target)
    assert convert(pair, "messages")["chosen"] == [thought]


def test_the_part_of_the_data_that_a_pair_is_of_is_written() -> None:
    pair = PreferencePair(id="d.jsonl:1", prompt="q", chosen="a", rejected="b", source="facts")
    assert convert(pair, "messages")["subset"] == "facts"
    assert "subset" not in convert(replace(pair, source="d.jsonl"), "messages")


def test_strings_and_rankings_come_back() -> None:
    pair = PreferencePair(id="f:1", prompt="q", chosen="a", rejected="b", margin=2.0, source="f")
    assert back(convert(pair, "strings"), "preference") == pair
    with pytest.raises(AlignError, match="a ranking has no margin"):
        convert(pair, "ranking")
    assert convert(replace(pair, margin=None), "ranking") == {
        "prompt": "q",
        "responses": ["a", "b"],
    }
    assert convert(pair, "hh") == {
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b",
        "margin": 2.0,
    }


CHAT = SFTExample(id="f:1", messages=(turn("user", "q"), turn("assistant", "a")))
LONGER = SFTExample(id="f:1", messages=(turn("system", "s"), turn("user", "p"), *CHAT.messages))


@pytest.mark.parametrize("target", ["messages", "sharegpt", "alpaca"])
def test_demonstrations_come_back(target: str) -> None:
    assert back(convert(CHAT, target), "sft") == CHAT


def test_what_a_format_has_no_place_for_is_refused() -> None:
    with pytest.raises(AlignError, match="alpaca's history is question, answer"):
        convert(LONGER, "alpaca")
    with pytest.raises(AlignError, match="it is plain text, with no prompt"):
        convert(SFTExample(id="f:1", text="t"), "messages")
    nested = (turn("user", "a\n\nHuman: b"),)
    pair = PreferencePair(id="f", prompt=nested, chosen="c", rejected="d")
    with pytest.raises(AlignError, match="a turn holds what HH-RLHF begins a turn with"):
        convert(pair, "hh")
    with pytest.raises(AlignError, match="--to hh: not for these rows; allowed: strings, messages"):
        convert(CHAT, "hh")


def test_prompts_come_back() -> None:
    prompt = PromptExample(id="f:1", prompt="q", references=("a",), source_text="s")
    assert back(convert(prompt, "prompts"), "prompt") == prompt


def test_all_kinds_have_targets() -> None:
    assert set(TARGETS) == {PreferencePair, SFTExample, PromptExample}


def test_a_row_is_told_the_formats_that_can_say_it() -> None:
    """Never the one that was asked for."""
    plain = SFTExample(id="f:1", text="words")
    for target in ("messages", "strings", "sharegpt", "alpaca"):
        with pytest.raises(AlignError) as caught:
            convert(plain, target)
        assert str(caught.value).endswith("no prompt; use --to text, or leave the row out")
    question = SFTExample(id="f:1", messages=(turn("user", "q"),))
    with pytest.raises(AlignError, match="use --to messages or --to sharegpt, or leave"):
        convert(question, "alpaca")
