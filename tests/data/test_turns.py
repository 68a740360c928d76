"""Keys of turns are kept, marks of training have one name, and text that is turns is recognised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.formats.columns import read_row
from align.data.formats.rankings import Rated
from align.data.formats.turns import is_written_turns
from align.data.sources import BadRow, Row

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def read(kind: Any, row: dict[str, Any]) -> Any:
    found = read_row(Row(row, "f:7"), kind, columns={}, source="f")
    return found if isinstance(found, Rated) else found[0]


def refusal(kind: Any, row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        read(kind, row)
    return str(caught.value)


def sft(*turns: dict[str, Any]) -> Any:
    return read("sft", {"messages": list(turns)}).messages


def bad(*turns: dict[str, Any]) -> str:
    return refusal("sft", {"messages": list(turns)}).removeprefix("f:7: messages: ")


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("weight", "loss_scale") for value in (0, 0.0, False)),
        *((key, False) for key in ("train", "training", "trainable", "loss")),
    ],
)
def test_a_turn_marked_not_to_be_trained(key, value) -> None:
    turns = sft(USER, {**OTHER, key: value}, USER, {**ASSISTANT, key: not value})
    assert turns == (USER, {**OTHER, "train": False}, USER, ASSISTANT)
    assert bad(USER, {**ASSISTANT, key: value}).startswith("no assistant turn to learn from")


def test_marks_of_other_turns_say_nothing_new() -> None:
    """SlimOrca gives every turn a weight, 0 to the user's."""
    system = {"role": "system", "content": "s"}
    turns = sft({**system, "weight": None}, {**USER, "weight": 0.0}, {**ASSISTANT, "weight": 1.0})
    assert turns == (system, USER, ASSISTANT)
    assert bad({**USER, "train": True}, ASSISTANT).startswith("train: true in a turn of user; only")


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", "no", [1], float("inf")])
def test_other_weights_are_refused(weight) -> None:
    assert f"weight {weight!r} of a turn; 1 or true: " in bad(USER, {**ASSISTANT, "weight": weight})


def test_half_turns_and_media_of_turns_are_refused() -> None:
    detail = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    assert bad(USER, {**ASSISTANT, "train_detail": detail}).startswith("train_detail, training on")
    assert bad({**USER, "images": ["aGk="]}, ASSISTANT).startswith("a turn with images, which are")


def test_an_answer_that_is_not_to_be_trained_is_no_side_of_a_pair() -> None:
    marked = {**ASSISTANT, "weight": 0}
    row = {"prompt": [USER], "chosen": [marked], "rejected": [OTHER]}
    assert refusal("preference", row).startswith("f:7: chosen: a turn that is not to be trained on")
    asked = [USER, {**marked}, {**USER, "content": "q2"}]
    pair = read("preference", {"prompt": asked, "chosen": [ASSISTANT], "rejected": [OTHER]})
    assert pair.prompt == (USER, ASSISTANT, {**USER, "content": "q2"})


def test_keys_go_to_the_template_as_they_are() -> None:
    thought = {**ASSISTANT, "reasoning_content": "Hm.", "tool_calls": None, "weight": 1}
    tool = {"role": "tool", "content": "31", "tool_call_id": "a", "name": "weather"}
    turns = sft(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tool, thought)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert turns == (USER, called, tool, {**ASSISTANT, "reasoning_content": "Hm."})
    old = {**ASSISTANT, "function_call": {"name": "weather", "arguments": "{}"}}
    assert sft(USER, old, ASSISTANT)[1] == old


def test_arguments_of_calls_become_objects() -> None:
    text = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (call,) = sft(USER, {**ASSISTANT, "tool_calls": [text]})[1]["tool_calls"]
    assert call == {**text, "function": {"name": "f", "arguments": {"a": 1}}}
    broken = {"function": {"name": "f", "arguments": "{a}"}}
    assert bad(USER, {**ASSISTANT, "tool_calls": [broken]}).startswith(
        "a tool call whose arguments"
    )


def test_what_json_has_no_way_to_say_is_refused() -> None:
    assert bad(USER, {**ASSISTANT, "name": b"x"}).startswith("name of a turn is no JSON value; ")
    assert bad(USER, {**ASSISTANT, "name": "\ud83d"}).startswith("name: half of a surrogate pair")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_half_a_surrogate_is_bad_whoever_says_it(role) -> None:
    said = bad({"role": role, "content": "x \ud83d"}, USER, ASSISTANT)
    assert said.startswith("half of a surrogate pair")


def test_half_a_surrogate_in_choices_and_parts_of_the_data() -> None:
    row = {"input": "q", "targets": {"choices": ["a\ud83d", "b"], "labels": [1, 0]}}
    assert "targets: half of a surrogate" in refusal("preference", row)
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "x\ud83d"}
    assert "subset: half of a surrogate" in refusal("preference", row)


def test_turns_that_differ_in_a_call_are_not_shared() -> None:
    first = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    second = {**first, "tool_calls": [{**CALL, "function": {"name": "g", "arguments": {}}}]}
    row = {"chosen": [USER, first, ASSISTANT], "rejected": [USER, second, ASSISTANT]}
    pair = read("preference", row)
    assert pair.prompt == (USER,)
    assert (pair.chosen, pair.rejected) == ((first, ASSISTANT), (second, ASSISTANT))
    asked = {"prompt": [USER, first, USER], "chosen": [USER, second, USER, ASSISTANT]}
    assert "chosen: not an answer" in refusal("preference", {**asked, "rejected": "b"})


def test_both_spellings_in_one_turn_have_to_agree() -> None:
    """Parquet gives every turn both keys, where files of both kinds were put together."""
    turns = [{"role": None, "content": None, **turn} for turn in ({"from": "human", "value": "q"},)]
    assert sft(*turns, {**ASSISTANT, "from": None, "value": None}) == (USER, ASSISTANT)
    assert bad(USER, {**ASSISTANT, "value": "b"}).startswith(
        "a turn whose content and value differ"
    )


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image", "text": None}, "image"),
        ({"type": "image", "text": ""}, "image"),
        ({"type": "image_url", "text": "", "image_url": {"url": "a.png"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {"data": "aa"}}, "input_audio"),
        ({"type": "text", "text": "x", "image": "a.png"}, "image"),
        ({"type": "text", "text": 4}, "a number (int)"),
        ({"type": "thinking", "thinking": "Hm."}, "thinking"),
    ],
)
def test_parts_that_are_no_text_are_named(part, named) -> None:
    said = bad({"role": "user", "content": [{"type": "text", "text": "see "}, part]}, ASSISTANT)
    start = f"a turn with something other than text; a part of it is {named}: only text is"
    assert said.startswith(start)


def test_parts_of_text_as_parquet_has_them() -> None:
    part = {"type": "text", "text": "q", "image": None, "image_url": None}
    assert sft({"role": "user", "content": [part]}, ASSISTANT) == (USER, ASSISTANT)


# ---------------------------------------------------------------- text that is turns

TURNS = [USER, ASSISTANT]
WRITTEN = {
    "JSON": json.dumps(TURNS),
    "indented JSON": json.dumps(TURNS, indent=2),
    "JSON twice": json.dumps(json.dumps(TURNS)),
    "one turn": json.dumps(USER),
    "Python": str(TURNS),
    "a tuple": str(tuple(TURNS)),
    "NumPy": "[{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]",
    "an array": "array([{'content': 'q', 'role': 'user'}], dtype=object)",
    "ShareGPT": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]',
    "keys before the role": "[{'id': 3, 'content': 'q', 'role': 'user'}]",
}
FIELDS: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "prompt", {"completion": "a"}),
    ("sft", "completion", {"prompt": "q"}),
    ("sft", "text", {}),
    ("sft", "output", {"instruction": "q"}),
    ("sft", "instruction", {"output": "a"}),
    ("preference", "prompt", {"chosen": "a", "rejected": "b"}),
    ("preference", "chosen", {"prompt": "q", "rejected": "b"}),
    ("preference", "rejected", {"prompt": "q", "chosen": "b"}),
    ("preference", "human_ref_A", {"history": "q", "human_ref_B": "b", "labels": 1}),
    ("preference", "response", {"prompt": "q", "score": 1}),
    ("prompt", "prompt", {}),
    ("prompt", "references", {"prompt": "q"}),
    ("prompt", "source_text", {"prompt": "q"}),
]


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize(("kind", "field", "row"), FIELDS)
def test_turns_written_as_text_are_recognised_in_every_field(kind, field, row, text) -> None:
    said = refusal(kind, {**row, field: text})
    assert said.startswith(f"f:7: {field}: turns written as text; give the list itself, in JSONL")


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_turns_written_as_text_where_turns_belong(field, text) -> None:
    said = refusal("sft", {field: text})
    assert said.startswith(f"f:7: {field}: not a list of turns, but text that may hold one; give")


@pytest.mark.parametrize(
    "text",
    [
        "[1] Smith, 2003. {a} and {b}",
        "{the role of the user} is: 'user'",
        '{"role": "admin", "content": "x"}',
        '{"name": "weather", "arguments": {"role": "user"}}',
        '[{"from": "ann@example.org", "value": 3}]',
        "[user] hello [assistant] hi",
        '[{"role": "user", "content": "q"}] is how a turn is written.',
        "def f(x): return {'role': 'user', 'content': x}",
        "[]",
        "{}",
    ],
)
def test_text_with_brackets_is_text(text) -> None:
    assert not is_written_turns(text)
    assert read("sft", {"prompt": text, "completion": "a"}).prompt == text


# ---------------------------------------------------------------- labels and numbers


@pytest.mark.parametrize(
    ("label", "value"),
    [(True, 1), (False, 0), ("TRUE", 1), ("true", 1), ("False", 0), (1, 1), ("0", 0), (0.5, 0.5)],
)
def test_labels_are_booleans_or_numbers(label, value) -> None:
    assert read("preference", {"prompt": "q", "completion": "a", "label": label}).score == value
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label}
    if value in (0, 1):
        assert read("preference", row).chosen == ("a" if value else "b")


def test_a_label_that_is_none_is_named() -> None:
    row = {"prompt": "q", "completion": "a", "label": "good"}
    assert refusal("preference", row).startswith("f:7: label: not a number; it is 'good'")
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": True}
    assert refusal("preference", row).startswith("f:7: margin: not a number; it is True")


@pytest.mark.parametrize(
    ("given", "references"),
    [(4, ("4",)), ([6], ("6",)), (-(10**20), ("-100000000000000000000",)), (["4", 4], ("4", "4"))],
)
def test_whole_numbers_are_references(given, references) -> None:
    assert read("prompt", {"prompt": "2+2?", "references": given}).references == references


@pytest.mark.parametrize("given", [4.0, [0.5], True, [None], {"a": 1}, [["x"]]])
def test_other_values_are_no_references(given) -> None:
    said = refusal("prompt", {"prompt": "q", "references": given})
    assert said.startswith("f:7: references: not a text but ")


def test_a_number_is_no_prompt_and_no_answer() -> None:
    said = "f:7: completion: not a string but a number (int); write it in quotes"
    assert refusal("sft", {"prompt": "q", "completion": 4}) == said


def test_a_response_without_a_score_says_so() -> None:
    said = refusal("preference", {"prompt": "q", "response": "a", "helpfulness": 3})
    assert said.startswith("f:7: score: missing; ")
    assert "data.columns.score=NAME" in said


def test_texts_that_say_not_who_speaks() -> None:
    """LIMA and UltraChat have lists of strings."""
    said = refusal("sft", {"conversations": ["q", "a"]})
    assert said.startswith("f:7: conversations: a list of texts, which does not say who speaks; ")


def test_turns_in_other_wrappings_are_named() -> None:
    """`datasets` gives a Sequence of dicts column by column; some write each turn as JSON."""
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    said = "f:7: messages: turns column by column: a list of roles, a list of contents; write a"
    assert refusal("sft", {"messages": columns}).startswith(said)
    texts = [json.dumps(USER), json.dumps(ASSISTANT)]
    said = "f:7: messages: a turn written as text; write {"
    assert refusal("sft", {"messages": texts}).startswith(said)


def test_a_prompt_that_is_a_list_written_as_text() -> None:
    said = refusal("prompt", {"prompt": '["q1", "q2"]'})
    assert said.startswith("f:7: prompt: a list written as text; give one text, or turns: ")
    row = {"prompt": "Three colours, as JSON.", "completion": '["red", "green", "blue"]'}
    assert read("sft", row).completion == row["completion"]
    assert read("prompt", {"prompt": "[1, 2]"}).prompt == "[1, 2]"
