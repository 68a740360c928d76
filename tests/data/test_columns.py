"""What rows mean: our own columns, the well-known sets', and the rows that say nothing usable."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.formats.columns import read_row
from align.data.sources import BadRow, Row
from align.types import AlignError, PromptExample, SFTExample


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(kind: str, row: dict, **columns: str):
    (example,) = read_row(Row(row, "f.jsonl:7"), kind, columns=columns, source="f.jsonl")
    return example


def pair(row: dict, **columns: str) -> tuple:
    example = read("preference", row, **columns)
    return example.prompt, example.chosen, example.rejected


def refusal(kind: str, row: dict, **columns: str) -> str:
    with pytest.raises(BadRow) as caught:
        read(kind, row, **columns)
    return str(caught.value)


# ---------------------------------------------------------------- preferences


def test_strings_with_an_explicit_prompt() -> None:
    row = {"prompt": "The capital of England is ", "chosen": "London", "rejected": "Paris "}
    assert pair(row) == ("The capital of England is ", "London", "Paris ")


def test_strings_without_a_prompt_are_never_split_by_their_common_prefix() -> None:
    """A peer made prompt "Paris", chosen " ", rejected "n" of such rows."""
    for chosen, rejected in (("Paris ", "London"), ("Paris ", "Parisn")):
        said = refusal("preference", {"chosen": chosen, "rejected": rejected})
        assert said.startswith("f.jsonl:7: prompt: missing; needed: prompt + chosen + rejected")


def test_an_implicit_prompt_is_the_shared_turns() -> None:
    shared = [user("Capital of France?"), assistant("Paris."), user("And of England?")]
    row = {
        "chosen": [*shared, assistant("Lovely London")],
        "rejected": [*shared, assistant("Lovely Leeds")],
    }
    assert pair(row) == (
        tuple(shared),
        (assistant("Lovely London"),),
        (assistant("Lovely Leeds"),),
    )


def test_an_implicit_prompt_leaves_an_answer_to_both_sides() -> None:
    """Here one conversation is the beginning of the other."""
    row = {
        "chosen": [user("q"), assistant("a"), assistant("b")],
        "rejected": [user("q"), assistant("a")],
    }
    assert pair(row) == ((user("q"),), (assistant("a"), assistant("b")), (assistant("a"),))


def test_a_conversation_without_an_answer_is_no_side_of_a_pair() -> None:
    row = {"chosen": [user("q")], "rejected": [user("q"), assistant("a")]}
    assert refusal("preference", row).startswith("f.jsonl:7: prompt: none: chosen and rej")


def test_conversations_that_part_at_a_users_turn_are_no_pair() -> None:
    row = {
        "chosen": [user("q"), assistant("a"), user("x"), assistant("b")],
        "rejected": [user("q"), assistant("a"), user("y"), assistant("c")],
    }
    assert refusal("preference", row) == (
        "f.jsonl:7: chosen: not an answer to the prompt; its turns are assistant, user, "
        "assistant: only assistant turns"
    )


def test_hh_strings_are_parsed_to_turns() -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello: you?\n\nHuman: Name a city"
    row = {
        "chosen": shared + "\n\nAssistant: Paris",
        "rejected": shared + "\n\nAssistant: Parisn",
    }
    assert pair(row) == (
        (user("Hi"), assistant("Hello: you?"), user("Name a city")),
        (assistant("Paris"),),
        (assistant("Parisn"),),
    )


def test_an_empty_hh_answer_is_bad() -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: no"}
    assert refusal("preference", row).startswith("f.jsonl:7: chosen: empty; ")


def test_ultrafeedback_repeats_its_prompt_in_both_answers() -> None:
    row = {
        "prompt": "q",
        "chosen": [user("q"), assistant("good")],
        "rejected": [user("q"), assistant("bad")],
        "messages": [user("q"), assistant("good")],
        "score_chosen": 8.5,
    }
    assert pair(row) == ((user("q"),), (assistant("good"),), (assistant("bad"),))


def test_a_prompt_that_is_the_first_of_several_questions() -> None:
    """Tulu 3's preferences: the answers repeat the whole conversation."""
    shared = [user("q"), assistant("x"), user("q2")]
    row = {
        "prompt": "q",
        "chosen": [*shared, assistant("good")],
        "rejected": [*shared, assistant("bad")],
    }
    expected = (tuple(shared), (assistant("good"),), (assistant("bad"),))
    assert pair(row) == pair({**row, "prompt": "q2"}) == expected
    said = "f.jsonl:7: prompt: is not among the turns that the answers share; mend the row"
    assert refusal("preference", {**row, "prompt": "other"}) == said


def test_a_system_turn_before_the_repeated_prompt_is_kept() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {
        "prompt": "q",
        "chosen": [system, user("q"), assistant("good")],
        "rejected": [system, user("q"), assistant("bad")],
    }
    assert pair(row) == ((system, user("q")), (assistant("good"),), (assistant("bad"),))


def test_prompt_and_answers_of_turns_with_and_without_the_prompt_repeated() -> None:
    expected = ((user("q"),), (assistant("good"),), (assistant("bad"),))
    prompt = [user("q")]
    for before in ([], prompt):
        row = {
            "prompt": prompt,
            "chosen": [*before, assistant("good")],
            "rejected": [*before, assistant("bad")],
        }
        assert pair(row) == expected
    assert pair({"prompt": prompt, "chosen": "good", "rejected": "bad"}) == expected


def test_shp_labels_say_which_reply_was_preferred() -> None:
    row = {"history": "q", "human_ref_A": "from A", "human_ref_B": "from B", "labels": 1}
    assert pair(row) == ("q", "from A", "from B")
    assert pair({**row, "labels": 0}) == ("q", "from B", "from A")
    assert refusal("preference", {**row, "labels": 2}).startswith("f.jsonl:7: labels: not 0 or 1")


def test_summarize_from_feedback_choice_is_an_index() -> None:
    row = {
        "info": {"post": "a long post", "article": None},
        "summaries": [{"text": "first", "policy": "x"}, {"text": "second", "policy": "y"}],
        "choice": 1,
    }
    assert pair(row) == ("a long post", "second", "first")
    assert pair({**row, "choice": 0}) == ("a long post", "first", "second")


def test_llama_factory_pairs_of_from_and_value() -> None:
    """Two rows as in its dpo_en_demo.json."""
    asked = {"from": "human", "value": "q1"}
    row = {
        "conversations": [asked],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    expected = (assistant("good"),), (assistant("bad"),)
    assert pair(row) == ((user("q1"),), *expected)
    longer = [{"from": "system", "value": "s"}, asked, {"from": "gpt", "value": "a1"}, asked]
    assert pair({**row, "conversations": longer}) == (
        ({"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q1")),
        *expected,
    )


def test_columns_reach_inside_by_dots() -> None:
    row = {"info": {"q": "why?"}, "answers": [{"t": "good"}, {"t": "bad"}], "gap": "1.5"}
    columns = {"prompt": "info.q", "chosen": "answers.0.t", "rejected": "answers.1.t"}
    example = read("preference", row, **columns, margin="gap")
    assert (example.prompt, example.chosen, example.rejected) == ("why?", "good", "bad")
    assert example.margin == 1.5
    assert (example.id, example.source) == ("f.jsonl:7", "f.jsonl")


def test_a_name_of_ours_that_no_format_has(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    source = DataSource(path=str(tmp_path / "rows.jsonl"), columns={"prompts": "prompt"})
    with pytest.raises(AlignError, match=r"data.columns.prompts: no such field; did you mean prom"):
        load_examples([source], kind="prompt")


def test_a_column_that_is_not_there_is_named() -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b"}
    assert refusal("preference", row, prompt="qestion") == (
        "f.jsonl:7: prompt: column 'qestion' is missing; there: question, chosen, rejected; "
        "correct data.columns.prompt (`align data`: --columns)"
    )


GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "good"}, "rejected: missing; needed: "),
        ({**GOOD, "rejected": None}, "rejected: null; give it a value"),
        ({**GOOD, "rejected": ""}, "rejected: empty; "),
        ({**GOOD, "chosen": " \n"}, "chosen: empty; "),
        ({**GOOD, "prompt": ""}, "prompt: empty; "),
        ({**GOOD, "rejected": "good"}, "rejected: is the same as chosen; remove the row"),
        ({**GOOD, "chosen": 3}, "chosen: not a string but a number (int); "),
        ({**GOOD, "chosen": []}, "chosen: empty; "),
        ({**GOOD, "chosen": [assistant(" ")]}, "chosen: empty; "),
        ({**GOOD, "chosen": [{"role": "assistant"}]}, "chosen: a turn without a role or"),
        ({**GOOD, "chosen": "\ud800"}, "chosen: half of a surrogate pair"),
        ({**GOOD, "chosen": [user("other"), assistant("a")]}, "prompt: is not among the turns"),
        ({**GOOD, "prompt": [user("q"), assistant("a")]}, "prompt: its last turn is the"),
        ({**GOOD, "margin": "large"}, "margin: not a number; it is 'large'"),
        ({**GOOD, "margin": float("nan")}, "margin: not a finite number; "),
    ],
)
def test_bad_pairs_name_their_field(row: dict, said: str) -> None:
    assert refusal("preference", row).startswith(f"f.jsonl:7: {said}")


# ---------------------------------------------------------------- supervised


def test_sft_formats() -> None:
    dialogue = (user("q"), assistant("a"))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = SFTExample(id="f.jsonl:7", messages=dialogue)
    assert read("sft", {"messages": list(dialogue)}) == expected
    assert read("sft", {"conversations": sharegpt}) == expected
    assert read("sft", {"instruction": "q", "input": "", "output": "a"}) == expected
    assert read("sft", {"text": "t"}) == SFTExample(id="f.jsonl:7", text="t")
    assert read("sft", {"prompt": "q", "completion": "a"}) == SFTExample(
        id="f.jsonl:7", prompt="q", completion="a"
    )


@pytest.mark.parametrize("history", [True, 3, "ab", ["ab"], [["q"]], {"ab": "cd"}, [None]])
def test_a_history_that_is_none_is_named(history: object) -> None:
    row = {"instruction": "q", "output": "a", "history": history}
    assert "history: not a list of (question, answer)" in refusal("sft", row)


@pytest.mark.parametrize(
    "targets", [{"choices": True, "labels": 1}, {"choices": [["a"], "b"], "labels": [1, 0]}]
)
def test_targets_that_are_none_are_named(targets: object) -> None:
    assert "f.jsonl:7: targets: has " in refusal("preference", {"input": "q", "targets": targets})


def test_alpaca_input_history_and_system_become_turns() -> None:
    row = {
        "system": "s",
        "history": [["q0", "a0"]],
        "instruction": "Translate:",
        "input": "wept",
        "output": "a",
    }
    assert read("sft", row).messages == (
        {"role": "system", "content": "s"},
        user("q0"),
        assistant("a0"),
        user("Translate:\nwept"),
        assistant("a"),
    )


def test_content_in_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}]
    row = {"messages": [user("q"), {"role": "assistant", "content": parts}]}
    assert read("sft", row).messages[-1] == assistant("one two")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"promt": "q"}, "messages: missing; needed: messages, prompt + completion, "),
        ({"prompt": "q"}, "completion: missing; "),
        ({"prompt": "q", "completion": ""}, "completion: empty; "),
        ({"text": " "}, "text: empty; "),
        ({"messages": [user("q")]}, "messages: no assistant turn to learn from; "),
        ({"messages": [user("q"), assistant("")]}, "messages: empty; "),
        ({"messages": "q"}, "messages: not a list of turns but str; "),
        ({"messages": '[{"role": "user"}]'}, "messages: not a list of turns, but text "),
        ({"messages": [user("q"), assistant("a")], "images": ["x.png"]}, "images: not supported;"),
        (
            {"messages": [user("q"), {**assistant("a"), "tool_calls": [{"type": "function"}]}]},
            "messages: a tool call without the name of its function; ",
        ),
    ],
)
def test_bad_sft_rows_name_their_field(row: dict, said: str) -> None:
    assert refusal("sft", row).startswith(f"f.jsonl:7: {said}")


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "given",
    [{"references": ["a"]}, {"references": "a"}, {"reference": "a"}, {"completion": "a"}],
)
def test_references_by_any_name(given: dict) -> None:
    expected = PromptExample(id="f.jsonl:7", prompt="q", references=("a",))
    assert read("prompt", {"prompt": "q", **given}) == expected


def test_several_references_and_a_source_text() -> None:
    row = {"prompt": "q", "references": ["a", "b"], "source_text": "s"}
    example = read("prompt", row)
    assert (example.references, example.source_text) == (("a", "b"), "s")
    assert read("prompt", {"prompt": "q"}).references == ()
    assert read("prompt", {"prompt": "q", "source": "wiki"}).source_text is None
    assert read("prompt", {"prompt": "q", "src": "s"}, source="src").source_text == "s"
    assert read("prompt", {"prompt": "q", "source": "s"}, source_text="source").source_text == "s"


def test_the_last_answer_of_a_conversation_is_the_reference() -> None:
    row = {"messages": [user("q"), assistant("a"), user("q2"), assistant("a2")]}
    example = read("prompt", row)
    assert example.prompt == (user("q"), assistant("a"), user("q2"))
    assert example.references == ("a2",)


def test_prompts_of_preference_files() -> None:
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert read("prompt", row) == PromptExample(id="f.jsonl:7", prompt=(user("q"),))


def test_bad_prompts_name_their_field() -> None:
    assert refusal("prompt", {"x": 1}).startswith("f.jsonl:7: prompt: missing; ")
    assert refusal("prompt", {"prompt": "q", "references": [""]}).startswith(
        "f.jsonl:7: references: empty; "
    )


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("assistent", "assistant"),
        ("Assistant", "assistant"),
        ("User", "user"),
        ("usr", "user"),
        ("sytem", "system"),
        ("GPT", "gpt"),
        ("assistant ", "assistant"),
    ],
)
def test_a_misspelt_role_names_the_right_one(role, meant) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = Row({"messages": [{"role": role, "content": "x"}, *turns]}, "d.jsonl:3")
    with pytest.raises(BadRow) as caught:
        read_row(row, "sft", columns={}, source="s")
    said = f"d.jsonl:3: messages: role {role!r}, which nobody has; did you mean {meant}? Allowed: "
    assert str(caught.value).startswith(said + "system, developer, user, assistant, tool, ")


@pytest.mark.parametrize("role", ["tool", "developer", "ipython", "narrator", "observation"])
def test_roles_that_a_template_may_have_are_read(role) -> None:
    turns = [{"role": role, "content": "x"}, {"role": "assistant", "content": "a"}]
    (example,) = read_row(Row({"messages": turns}, "d"), "sft", columns={}, source="s")
    assert example.messages[0]["role"] == role
