"""Tools go to the chat template or the row is refused; calls of other trainers are calls."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.columns import Example, read_row
from align.data.formats.rankings import Rated
from align.data.inspect.convert import convert
from align.data.sources import BadRow, Row
from align.data.tokens.chat import encode_pair, encode_prompt, encode_sft
from align.types import AlignError, SFTExample

from .templates import CHATML, HERMES, MISTRAL_TOOLS
from .test_unread import STRINGS, SYSTEM, TURNS, opening

FUNCTION = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "Rome?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"celsius": 31}'}
ANSWER = {"role": "assistant", "content": "31 degrees."}
ROW = {"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]}


def read(kind: Any, row: dict[str, Any], **columns: str) -> Any:
    found = read_row(Row(row, "f:7"), kind, columns=columns, source="f")
    return found if isinstance(found, Rated) else found[0]


def refusal(kind: Any, row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        read(kind, row)
    return str(caught.value)


def served(tokenizer: Any, turns: Any, tools: Any, **options: bool) -> str:
    """The text that transformers gives a server."""
    text = tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, **options)
    return str(text)


# ---------------------------------------------------------------- the column


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("value", [[TOOL], json.dumps([TOOL]), [FUNCTION], [json.dumps(TOOL)]])
def test_tools_are_kept_in_the_first_turn_of_every_conversation(name: str, value: Any) -> None:
    kind, row = TURNS[name]
    bare = opening(read(kind, row))
    example = read(kind, {**row, "tools": value})
    assert opening(example) == ({**bare[0], "tools": [TOOL]}, *bare[1:])
    with_system = opening(read(kind, {**row, "tools": value, "system": "Be brief."}))
    assert with_system == ({**SYSTEM, "tools": [TOOL]}, *bare)
    for nothing in (None, "", "[]", [], [None]):
        assert opening(read(kind, {**row, "tools": nothing})) == bare


@pytest.mark.parametrize("name", STRINGS)
def test_tools_beside_strings_are_refused(name: str) -> None:
    kind, row = STRINGS[name]
    line = refusal(kind, {**row, "tools": [TOOL]})
    assert line.startswith("f:7: tools: beside a prompt that is a string, which no chat template")
    if name in ("completion", "pair", "prompt", "ranking", "rating"):  # as it advises
        example = read(kind, {**row, "tools": [TOOL]}, instruction="prompt")
        assert opening(example)[0]["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("weather", "text that is no JSON; give"),
        ({"weather": FUNCTION}, "not a list of tools; give"),
        ([7], "a tool that is no object; give"),
        ([{"description": "x"}], "a tool without the name of its function; give"),
        ([{"name": "x", "day": b"x"}], "tools of a turn is no JSON value; it is a"),
    ],
)
def test_what_is_no_list_of_tools_is_refused(value: Any, said: str) -> None:
    assert refusal("sft", {**ROW, "tools": value}).startswith(f"f:7: tools: {said}")


def test_nulls_that_parquet_puts_into_objects_are_taken_out() -> None:
    """JSON text is taken word for word; tools of other kinds are taken as they are."""
    null = {**FUNCTION, "strict": None, "parameters": {"type": "object", "required": None}}
    kept = {**FUNCTION, "parameters": {"type": "object"}}
    assert read("sft", {**ROW, "tools": [null]}).messages[0]["tools"][0]["function"] == kept
    text = json.dumps([{**TOOL, "function": null}])
    assert read("sft", {**ROW, "tools": text}).messages[0]["tools"][0]["function"] == null
    search = {"type": "web_search"}
    assert read("sft", {**ROW, "tools": [search]}).messages[0]["tools"] == [search]


def test_tools_of_a_turn_and_of_a_column_have_to_agree() -> None:
    turns = [{**USER, "tools": [FUNCTION]}, ANSWER]
    first = {**USER, "tools": [TOOL]}
    assert read("sft", {"messages": turns}).messages == (first, ANSWER)
    assert read("sft", {"messages": turns, "tools": [TOOL]}).messages == (first, ANSWER)
    with_system = read("sft", {"messages": turns, "system": "Be brief."}).messages
    assert with_system == ({**SYSTEM, "tools": [TOOL]}, USER, ANSWER)
    other = [{**TOOL, "function": {"name": "news"}}]
    assert refusal("sft", {"messages": turns, "tools": other}).startswith("f:7: tools: differ from")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_files_and_records_on_disk_keep_tools(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    row: dict[str, Any] = {"messages": [USER, ANSWER], "tools": [TOOL]}
    if suffix == "csv":
        row = {"instruction": "Rome?", "output": "31 degrees.", "tools": json.dumps([TOOL])}
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, row.keys())
            writer.writeheader()
            writer.writerow(row)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    loaded = load_examples([DataSource(path=str(path))], kind="sft", folder=tmp_path)
    (example,) = loaded.examples
    assert example.messages == ({**USER, "tools": [TOOL]}, ANSWER)
    assert loaded.reports[0].unread == ()


def test_reward_functions_may_ask_for_the_tools() -> None:
    assert read("prompt", {"prompt": [USER], "tools": [TOOL], "id": 3}).extra == {
        "id": 3,
        "tools": [TOOL],
    }


def test_answers_to_one_question_with_other_tools_are_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [
        {"prompt": [USER], "response": f"{n}", "score": n, "tools": [{"name": f"t{n // 2}"}]}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_examples([DataSource(path=str(path))], kind="preference").examples
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs] == [
        ("1", "0"),
        ("3", "2"),
    ]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", [HERMES, MISTRAL_TOOLS])
@pytest.mark.parametrize("system", [False, True])
def test_rows_with_tools_have_the_text_that_serving_gives(make_tokenizer, template, system) -> None:
    tokenizer = make_tokenizer(template=template)
    before = [SYSTEM] if system else []
    chat = read("sft", {"messages": [*before, USER, ANSWER], "tools": [TOOL]})
    (sequence,) = encode_sft(tokenizer, chat).continuations
    whole = served(tokenizer, [*before, USER, ANSWER], [TOOL])
    assert "weather" in whole
    assert tokenizer.decode(sequence.input_ids) == whole.rstrip("\n")
    prompt = read("prompt", {"prompt": [*before, USER], "tools": json.dumps([FUNCTION])})
    asked = served(tokenizer, [*before, USER], [TOOL], add_generation_prompt=True)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt.prompt)) == asked
    row = {"prompt": [*before, USER], "chosen": [ANSWER], "rejected": [CALLING], "tools": [TOOL]}
    if template == HERMES:
        group = encode_pair(tokenizer, read("preference", row))
        assert tokenizer.decode(group.prefix_ids) == asked
        assert "<tool_call>" in tokenizer.decode(group.continuations[1].input_ids)


def test_each_call_and_answer_is_trained_behind_the_tools(make_tokenizer) -> None:
    tokenizer = make_tokenizer(template=HERMES)
    (sequence,) = encode_sft(tokenizer, read("sft", ROW)).continuations
    trained = tokenizer.decode(sequence.input_ids[sequence.loss_mask])
    assert trained == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
        "31 degrees.<|im_end|>"
    )
    assert tokenizer.decode(sequence.input_ids).startswith("<|im_start|>system\n# Tools\n")


@pytest.mark.parametrize("system", [False, True])
def test_a_template_that_writes_no_tools_is_refused_by_name(make_tokenizer, system) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    before = [SYSTEM] if system else []
    row = {"messages": [*before, USER, ANSWER]}
    encode_sft(tokenizer, read("sft", row))
    said = "the chat template writes no tools, but the rows have some; write them into the system"
    for value in ([TOOL], json.dumps([TOOL])):
        with pytest.raises(AlignError, match=said):
            encode_sft(tokenizer, read("sft", {**row, "tools": value}))
        prompt = read("prompt", {"prompt": [*before, USER], "tools": value})
        with pytest.raises(AlignError, match=said):
            encode_prompt(tokenizer, prompt.prompt)


# ---------------------------------------------------------------- other formats


@pytest.mark.parametrize("name", TURNS)
def test_converted_rows_have_tools_as_a_column(name: str) -> None:
    kind, row = TURNS[name]
    if name == "rating":
        return  # pairs come of several rows
    example: Example = read(kind, {**row, "tools": [TOOL], "system": "Be brief."})
    targets = {
        "sft": ("messages", "sharegpt", "alpaca"),
        "preference": ("messages", "conversations", "sharegpt", "alpaca"),
        "prompt": ("prompts",),
    }[kind]
    for target in targets:
        written = convert(example, target)
        assert written["tools"] == [TOOL]
        assert str(written).count("weather") == 2  # name and description, once each
        assert opening(read(kind, written))[0] == opening(example)[0]
    if kind == "preference":
        with pytest.raises(AlignError, match="strings has no place for tools; use --to messages"):
            convert(example, "strings")


def sharegpt(call: str, result: str, words: Any = None) -> list[dict[str, str]]:
    asked = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    return [
        {"from": "human", "value": "Rome?"},
        {"from": call, "value": asked if words is None else words},
        {"from": result, "value": '{"celsius": 31}'},
        {"from": "gpt", "value": "31 degrees."},
    ]


@pytest.mark.parametrize(
    ("call", "result"),
    [("function_call", "observation"), ("tool_call", "tool_response"), ("tool_call", "tool")],
)
def test_calls_of_other_trainers_are_calls(make_tokenizer, call: str, result: str) -> None:
    turns = sharegpt(call, result)
    row = {"conversations": turns, "tools": json.dumps([FUNCTION])}
    example = read("sft", row)
    assert example == read("sft", ROW)
    as_text = json.dumps({"name": "weather", "arguments": '{"city": "Rome"}'})
    assert read("sft", {**row, "conversations": sharegpt(call, result, as_text)}) == example
    roles = [{"role": t["from"], "content": t["value"], "from": None} for t in turns]
    assert read("sft", {"messages": roles, "tools": [TOOL]}) == example
    encode_sft(make_tokenizer(template=HERMES), example)
    with pytest.raises(AlignError, match="leaves out 'tool_calls' of a turn of role 'assistant'"):
        encode_sft(make_tokenizer(template=CHATML), read("sft", {"conversations": turns}))


def test_calls_side_by_side_are_one_turn() -> None:
    other = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = sharegpt("tool_call", "tool_response")
    both = [CALL, {"type": "function", "function": other}]
    in_turn = [*turns[:2], {"from": "tool_call", "value": json.dumps(other)}, *turns[2:]]
    listed = sharegpt("tool_call", "tool_response", json.dumps([c["function"] for c in both]))
    for given in (in_turn, listed):
        messages = read("sft", {"conversations": given}).messages
        assert messages == (USER, {**CALLING, "tool_calls": both}, RESULT, ANSWER)
    silent = {"from": "tool_call", "value": json.dumps(other), "weight": 0}
    apart = read("sft", {"conversations": [*turns[:2], silent, *turns[2:]]}).messages
    assert [turn.get("train", True) for turn in apart] == [True, True, False, True, True]


@pytest.mark.parametrize("words", ["weather(Rome)", '{"name": "weather"}', "[]", "7", "[7]", '"x"'])
def test_a_call_in_another_spelling_keeps_its_role(make_tokenizer, words: str) -> None:
    """So the template writes it or refuses it by name."""
    example = read("sft", {"conversations": sharegpt("function_call", "observation", words)})
    assert [t["role"] for t in example.messages][1:3] == ["function_call", "observation"]
    with pytest.raises(AlignError, match="does not know the role 'function_call'"):
        encode_sft(make_tokenizer(template=HERMES), example)


def test_an_observation_without_a_call_keeps_its_role() -> None:
    """GLM's templates have it."""
    turns = [USER, {"role": "observation", "content": "31"}, ANSWER]
    example: SFTExample = read("sft", {"messages": turns})
    assert example.messages == tuple(turns)


def test_a_call_may_be_an_answer_of_a_pair() -> None:
    turns = sharegpt("function_call", "observation")
    row = {"conversations": turns[:1], "chosen": turns[1], "rejected": turns[3]}
    pair = read("preference", {**row, "tools": [TOOL]})
    assert (pair.chosen, pair.rejected) == ((CALLING,), (ANSWER,))
