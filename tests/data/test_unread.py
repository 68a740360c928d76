"""Nothing of a row is lost without a word: system texts, meaningful columns, extra columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.columns import read_row
from align.data.formats.rankings import Rated
from align.data.formats.unread import MEANING
from align.data.inspect.check import inspect
from align.data.sources import BadRow, Row
from align.data.stream_counts import Counts, SourceCounts, examples_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SYSTEM = {"role": "system", "content": "Be brief."}

TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("sft", {"messages": [USER, ASSISTANT]}),
    "sharegpt": ("sft", {"conversations": GPT}),
    "alpaca": ("sft", {"instruction": "q", "output": "a"}),
    "dolly": ("sft", {"instruction": "q", "context": "", "response": "a"}),
    "completion of turns": ("sft", {"prompt": [USER], "completion": [ASSISTANT]}),
    "pair": ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}),
    "whole pair": ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}),
    "ultrafeedback": (
        "preference",
        {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    ),
    "alpaca pair": ("preference", {"instruction": "q", "chosen": "a", "rejected": "b"}),
    "sharegpt pair": (
        "preference",
        {"conversations": GPT[:1], "chosen": GPT[1], "rejected": {"from": "gpt", "value": "b"}},
    ),
    "hh": (
        "preference",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ),
    "hhh": ("preference", {"input": "q", "targets": {"choices": ["a", "b"], "labels": [1, 0]}}),
    "ranking": ("preference", {"prompt": [USER], "responses": ["a", "b"]}),
    "rating": ("preference", {"prompt": [USER], "response": "a", "score": 1}),
    "prompt": ("prompt", {"prompt": [USER]}),
    "alpaca prompt": ("prompt", {"instruction": "q"}),
    "prompts of messages": ("prompt", {"messages": [USER, ASSISTANT]}),
    "prompts of pairs": ("prompt", {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}),
}
STRINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("sft", {"prompt": "q", "completion": "a"}),
    "text": ("sft", {"text": "t"}),
    "pair": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    "shp": ("preference", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}),
    "summaries": ("preference", {"info": {"post": "q"}, "summaries": ["a", "b"], "choice": 0}),
    "webgpt": (
        "preference",
        {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0},
    ),
    "ranking": ("preference", {"prompt": "q", "responses": ["a", "b"]}),
    "rating": ("preference", {"prompt": "q", "completion": "a", "label": True}),
    "prompt": ("prompt", {"prompt": "q"}),
    "prompts of shp": (
        "prompt",
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    ),
}
ALL = [*TURNS.values(), *STRINGS.values()]
TEXTS = [(kind, row) for kind, row in ALL if "text" not in row]


def read(kind: Any, row: dict[str, Any], unread: dict[str, None] | None = None, **columns: str):
    found = read_row(Row(row, "f:7"), kind, columns=columns, source="f", unread=unread)
    return found if isinstance(found, Rated) else found[0]


def refusal(kind: Any, row: dict[str, Any], **columns: str) -> str:
    with pytest.raises(BadRow) as caught:
        read(kind, row, **columns)
    return str(caught.value)


def opening(example: Any) -> tuple[Any, ...]:
    return getattr(example, "messages", None) or example.prompt


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_text_opens_every_conversation(name, column) -> None:
    kind, row = TURNS[name]
    bare = read(kind, row)
    example = read(kind, {**row, column: "Be brief."})
    assert opening(example) == (SYSTEM, *opening(bare))
    assert opening(read(kind, {**row, column: " "})) == opening(bare)


@pytest.mark.parametrize("name", STRINGS)
def test_a_system_text_beside_strings_is_refused(name) -> None:
    kind, row = STRINGS[name]
    said = refusal(kind, {**row, "system": "Be brief."})
    assert said.startswith("f:7: system: beside a prompt that is a string, which no chat template")
    assert "write the prompt as turns: " in said


@pytest.mark.parametrize("name", ["completion", "pair", "prompt", "ranking", "rating"])
def test_strings_with_a_system_text_are_read_as_a_conversation_where_that_is_asked(name) -> None:
    """What the refusal advises works: data.columns.instruction=prompt."""
    kind, row = STRINGS[name]
    example = read(kind, {**row, "system": "Be brief."}, instruction="prompt")
    assert opening(example)[:2] == (SYSTEM, USER)


def test_two_system_texts_have_to_agree() -> None:
    row = {"messages": [SYSTEM, USER, ASSISTANT]}
    assert read("sft", {**row, "system": " Be brief."}).messages == (SYSTEM, USER, ASSISTANT)
    said = "f:7: system: differs from the row's other system text; keep one of them"
    assert refusal("sft", {**row, "system": "Be long."}) == said
    two = {"messages": [USER, ASSISTANT], "system": "x", "system_prompt": "y"}
    assert refusal("sft", two) == said


@pytest.mark.parametrize(("kind", "row"), ALL)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", ["a.png"]),
        ("image", {"path": "a.png", "bytes": None}),
        ("videos", ["a.mp4"]),
        ("audios", ["a.wav"]),
        ("functions", [{"name": "weather"}]),
        ("function_call", {"name": "weather", "arguments": "{}"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("weight", 0.5),
        ("weights", [0, 1]),
    ],
)
def test_columns_with_a_meaning_are_refused_in_every_format(kind, row, name, value) -> None:
    assert refusal(kind, {**row, name: value}).startswith(f"f:7: {name}: ")


@pytest.mark.parametrize(("kind", "row"), ALL)
def test_the_same_columns_with_nothing_in_them_are_no_trouble(kind, row) -> None:
    """Parquet and CSV give every row every column."""
    unread: dict[str, None] = {}
    nothing = {"images": [], "videos": [None], "audios": None, "tool_calls": "[]", "functions": {}}
    nan = float("nan")  # as pandas fills an empty place
    more = {
        "weight": nan,
        "tools": nan,
        "image": nan,
        "thinking": "",
        "weights": [],
        "system": "",
        "function_call": {},
    }
    assert read(kind, {**row, **nothing, **more}, unread) is not None
    assert not unread.keys() & {"images", "videos", "tools", "thinking", "weights", "system"}


@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_thinking_beside_an_answer_is_refused_and_beside_a_prompt_not_read(name) -> None:
    for kind, row in ALL:
        if kind != "prompt":
            assert f"f:7: {name}: not read: thinking" in refusal(kind, {**row, name: "Hm."})
        else:
            read(kind, {**row, name: "Hm."}, unread := {})
            assert name in unread
    assert "f:7: reasoning: not read" in refusal(
        "sft", {**STRINGS["completion"][1], "reasoning": "Hm"}
    )
    read("preference", {**STRINGS["pair"][1], "reasoning": "A is right."}, unread := {})
    assert "reasoning" in unread


@pytest.mark.parametrize("name", ["messages", "pair", "prompt", "hh"])
def test_a_history_that_a_format_does_not_read_is_refused(name) -> None:
    kind, row = TURNS[name]
    assert refusal(kind, {**row, "history": [["q0", "a0"]]}).startswith("f:7: history: not read")


def test_an_answer_labelled_wrong_is_not_learnt() -> None:
    row = {"prompt": "q", "completion": "a"}
    for label in (False, "FALSE", "false", 0, "0", 0.0):
        assert "label: false: an answer" in refusal("sft", {**row, "label": label})
    for label in (True, "true", 1, "poem"):
        assert read("sft", {**row, "label": label}).completion == "a"
    assert read("sft", {"text": "a film", "label": 0}).text == "a film"
    assert read("sft", {"messages": [USER, ASSISTANT], "label": 0}).messages == (USER, ASSISTANT)
    assert "kto_tag: false" in refusal("sft", {"messages": [USER, ASSISTANT], "kto_tag": False})


def test_margins_are_read_of_pairs_and_refused_of_rankings() -> None:
    for name, (kind, row) in {**TURNS, **STRINGS}.items():
        if kind != "preference" or "ranking" in name or "rating" in name:
            continue
        assert read(kind, {**row, "margin": "1.5"}).margin == 1.5
    for name in ("ranking", "rating"):
        kind, row = STRINGS[name]
        assert "f:7: margin: not read in this format" in refusal(kind, {**row, "margin": 1})
        assert read(kind, {**row, "margin": None}) is not None


def test_a_message_of_a_tree_is_no_plain_text() -> None:
    row = {
        "message_id": "1",
        "parent_id": "0",
        "message_tree_id": "0",
        "text": "Hi",
        "role": "prompter",
    }
    assert "rows that are messages of a tree" in refusal("sft", row)


def test_a_column_that_is_named_and_not_read_is_refused() -> None:
    row = {"messages": [USER, ASSISTANT], "gap": 2}
    said = refusal("sft", row, margin="gap")
    assert said.startswith("f:7: margin: named in data.columns, but this format does not read it;")


@pytest.mark.parametrize(("kind", "row"), ALL)
def test_extra_columns_are_named_in_every_format(kind, row) -> None:
    unread: dict[str, None] = {}
    read(kind, {**row, "topic": "ice", "meta": {"a": 1}}, unread)
    assert {"topic", "meta"} <= unread.keys()
    assert not unread.keys() & {"messages", "instruction", "input", "targets", "info", "labels"}


def test_a_renamed_column_counts_as_read() -> None:
    unread: dict[str, None] = {}
    row = {"q": {"text": "why?"}, "good": "a", "bad": "b", "chosen": "old"}
    read("preference", row, unread, prompt="q.text", chosen="good", rejected="bad")
    assert list(unread) == ["chosen (data.columns names another)"]
    read(
        "preference",
        {**row, "chosen": None},
        unread := {},
        prompt="q.text",
        chosen="good",
        rejected="bad",
    )
    assert list(unread) == []


def test_notes_about_turns_are_reported() -> None:
    unread: dict[str, None] = {}
    turns = [{**USER, "timestamp": "1", "id": 3}, {**ASSISTANT, "model": "m"}]
    assert read("sft", {"messages": turns}, unread).messages == (USER, ASSISTANT)
    assert list(unread) == ["turns[].id", "turns[].model", "turns[].timestamp"]


def test_prompts_keep_their_extra_columns_for_rewards(tmp_path) -> None:
    row = {"prompt": "q", "tests": ["f(1) == 2"], "level": 3, "when": None}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for folder in (None, tmp_path):
        loaded = load_examples([DataSource(path=str(path))], kind="prompt", folder=folder)
        assert loaded.examples[0].extra == {"tests": ["f(1) == 2"], "level": 3, "when": None}
        assert loaded.reports[0].unread == ("tests", "level")


def test_a_stream_counts_unread_columns_over_a_checkpoint() -> None:
    counts = SourceCounts("f")
    row = Row({"prompt": "q", "completion": "a", "topic": "ice"}, "f:1")
    options: dict[str, Any] = {"kind": "sft", "on_bad_row": "stop", "seed": 0}
    examples_of(row, DataSource(path="f"), counts, **options)
    again = Counts.of(Counts([counts]).report())
    assert list(again.sources[0].unread) == ["topic"]


def test_check_convert_and_judgements_say_it(tmp_path, capsys) -> None:
    pairs = tmp_path / "p.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "topic": "x"} for n in range(2)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect([DataSource(path=str(pairs))]).reports[0].unread == ("topic",)
    assert main(["data", "check", str(pairs)]) == 0
    assert "  2 of 2 rows usable; columns not read: topic" in capsys.readouterr().out
    out = tmp_path / "o.jsonl"
    assert main(["data", "convert", str(pairs), "--to", "messages", "-o", str(out)]) == 0
    assert f"  {pairs}: not written: topic" in capsys.readouterr().out
    judged = tmp_path / "j.jsonl"
    row = {"prompt": "q", "a": "x", "b": "y", "winner": "a", "system": "Be brief."}
    judged.write_text(json.dumps(row) + "\n")
    assert main(["data", "rank", str(judged)]) == 2
    assert f"{judged}:1: system: beside a prompt that is a string" in capsys.readouterr().err


def test_dolly_and_verl_and_prompts_of_known_sets() -> None:
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "qa"}
    asked = {"role": "user", "content": "Who?\nAnn came."}
    assert read("sft", row).messages == (asked, {"role": "assistant", "content": "Ann."})
    assert read("prompt", row).references == ("Ann.",)
    both = {"instruction": "Who?", "context": "Ann came.", "output": "Ann."}
    said = "not read here, though it is a part of the instruction; "
    assert refusal("sft", both) == f"f:7: context: {said}data.columns.input=context"
    assert read("sft", both, input="context").messages[0] == asked
    renamed = {"instruction": "Who?", "input": "Ann came.", "output": "Ann."}
    named = {"prompt": "instruction", "completion": "output"}
    assert refusal("sft", renamed, **named).startswith(f"f:7: input: {said}leave instruction")
    verl = {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": 4}, "ability": "m"}
    assert read("prompt", verl, unread := {}).references == ("4",)
    assert list(unread) == ["ability"]
    for name in ("shp", "summaries", "webgpt"):
        assert read("prompt", STRINGS[name][1]).prompt == "q"


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_the_page_names_every_column_with_a_meaning() -> None:
    assert [name for name in MEANING if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_every_column_of_the_pages_examples_is_read(kind) -> None:
    lines = "".join(re.findall(rf"^```jsonl {kind}\n(.*?)^```", PAGE, re.M | re.S)).splitlines()
    assert len(lines) > 5
    for line in lines:
        unread: dict[str, None] = {}
        read(kind, json.loads(line), unread)
        assert list(unread) == [], line


@pytest.mark.parametrize("truth", ["4", None])
def test_the_ground_truth_is_read_also_where_it_is_null(truth: str | None) -> None:
    truths = {"style": "rule", "ground_truth": truth}
    unread: dict[str, None] = {}
    example = read("prompt", {"prompt": "q", "reward_model": truths}, unread)
    assert example.references == (() if truth is None else (truth,))
    assert not unread


@pytest.mark.parametrize("value", [[None, "a"], [["a"]], {"text": "x"}, float("nan")])
def test_no_quotes_are_advised_around_what_is_no_number(value: object) -> None:
    said = refusal("prompt", {"prompt": "q", "references": value})
    assert said.endswith("; give one text, or a list of texts")


def test_quotes_are_advised_around_a_number() -> None:
    said = refusal("prompt", {"prompt": "q", "references": 0.5})
    assert "not a text but a number (float); write it in quotes" in said


def test_half_a_surrogate_in_tools_names_them_once() -> None:
    tools = [{"name": "f", "description": "\ud83d"}]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert "f:7: tools: half of a surrogate pair" in refusal("sft", {**row, "tools": tools})
