"""The loader: what stops it, what it counts, and that no prompt falls on both sides."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.sections import DataSource
from align.data.examples import load_examples, prompt_key, split_by_prompt
from align.types import AlignError, PreferencePair, PromptExample, SFTExample

GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}
BAD_LINES = (
    json.dumps({"prompt": "q", "chosen": "good"}),
    json.dumps({**GOOD, "rejected": ""}),
    json.dumps({**GOOD, "rejected": ""}),
    json.dumps({**GOOD, "rejected": "good"}),
    '{"prompt": "q", ',
)


def write(path: Path, lines: list[str]) -> DataSource:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return DataSource(path=str(path))


def numbered(path: Path, count: int, **source: object) -> DataSource:
    write(path, [json.dumps({"prompt": f"q{n}"}) for n in range(count)])
    return DataSource(path=str(path), **source)


def test_the_first_bad_row_stops_with_place_field_and_ways_out(tmp_path) -> None:
    source = write(tmp_path / "d.jsonl", [json.dumps(GOOD)] * 6 + [BAD_LINES[4]])
    with pytest.raises(AlignError) as caught:
        load_examples([source], kind="preference")
    said = str(caught.value)
    assert said.startswith(f"{source.path}:7: row: malformed JSON; ")
    assert said.endswith("; or set data.on_bad_row=skip")
    assert "\n" not in said


def test_skipped_rows_are_counted_by_reason_and_add_up(tmp_path) -> None:
    source = write(tmp_path / "d.jsonl", [json.dumps(GOOD), *BAD_LINES, json.dumps(GOOD)])
    loaded = load_examples([source], kind="preference", on_bad_row="skip")
    (report,) = loaded.reports
    assert [e.id for e in loaded.examples] == [f"{source.path}:1", f"{source.path}:7"]
    assert report.dropped == {
        "rejected: missing": 1,
        "rejected: empty": 2,
        "rejected: is the same as chosen": 1,
        "row: malformed JSON": 1,
    }
    assert (report.rows_read, report.rows_kept) == (7, 2)
    assert report.rows_read == report.rows_kept + sum(report.dropped.values())
    assert report.first_dropped[0].startswith(f"{source.path}:2: rejected: missing")
    raw = Path(source.path).read_bytes()
    assert report.sha256 == hashlib.sha256(raw).hexdigest()


def test_a_file_without_one_good_row_is_an_error_even_when_skipping(tmp_path) -> None:
    source = write(tmp_path / "d.jsonl", list(BAD_LINES))
    with pytest.raises(
        AlignError, match=r"none of 5 rows can be used; the first: .*d.jsonl:1: rej"
    ):
        load_examples([source], kind="preference", on_bad_row="skip")
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(AlignError, match=r"empty.jsonl: no row in it"):
        load_examples([empty], kind="preference")


def test_llama_factory_file_loads_without_any_columns(tmp_path) -> None:
    path = tmp_path / "dpo_en_demo.json"
    rows = [
        {
            "conversations": [{"from": "human", "value": f"q{n}"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        }
        for n in range(2)
    ]
    path.write_text(json.dumps(rows, indent=2))
    examples = load_examples([DataSource(path=str(path))], kind="preference").examples
    assert [e.prompt[0]["content"] for e in examples] == ["q0", "q1"]
    assert [e.id for e in examples] == [f"{path}:row 1", f"{path}:row 2"]


def test_weights_are_copies(tmp_path) -> None:
    sources = [
        numbered(tmp_path / "half.jsonl", 10, weight=0.5),
        numbered(tmp_path / "more.jsonl", 4, weight=2.5),
    ]
    loaded = load_examples(sources, kind="prompt", seed=1)
    half, more = loaded.reports
    assert len(loaded.examples) == 5 + 10
    assert (half.rows_read, half.rows_kept) == (10, 5)
    assert half.dropped == {"left out by weight 0.5": 5}
    assert (more.rows_read, more.rows_kept, more.dropped) == (4, 4, {})
    lines = [int(e.id.rpartition(":")[2]) for e in loaded.examples[:5]]
    assert lines == sorted(lines)
    assert len({e.id for e in loaded.examples}) == 15  # copies are told apart: ...:3#2
    assert loaded.examples == load_examples(sources, kind="prompt", seed=1).examples
    others = [load_examples(sources, kind="prompt", seed=s).examples for s in range(2, 6)]
    assert any(other != loaded.examples for other in others)


def test_a_weight_that_leaves_nothing_of_a_source_is_refused(tmp_path) -> None:
    source = numbered(tmp_path / "d.jsonl", 3, weight=0.1)
    with pytest.raises(AlignError, match=r"d.jsonl: a weight of 0.1 leaves none of its 3 rows"):
        load_examples([source], kind="prompt")


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_must_be_above_zero(tmp_path, weight: float) -> None:
    source = numbered(tmp_path / "d.jsonl", 3, weight=weight)
    with pytest.raises(AlignError, match=r"d.jsonl: weight is .*, must be above 0"):
        load_examples([source], kind="prompt")


def pairs(prompts: list[str]) -> list[PreferencePair]:
    return [
        PreferencePair(id=str(n), prompt=p, chosen=f"c{n}", rejected="r")
        for n, p in enumerate(prompts)
    ]


@given(
    st.lists(st.text("ab ", max_size=3), max_size=40),
    st.floats(0, 1),
    st.integers(0, 99),
    st.randoms(),
)
def test_one_prompts_pairs_never_fall_on_both_sides(prompts, fraction, seed, random) -> None:
    examples = pairs(prompts)
    train, test = split_by_prompt(examples, test_fraction=fraction, seed=seed)
    assert sorted(e.id for e in (*train, *test)) == sorted(e.id for e in examples)
    assert not {prompt_key(e) for e in train} & {prompt_key(e) for e in test}
    # reordered, and with rows left out, every row stays on its side
    fewer = random.sample(examples, len(examples) // 2)
    _, fewer_test = split_by_prompt(fewer, test_fraction=fraction, seed=seed)
    assert {e.id for e in fewer_test} == {e.id for e in test} & {e.id for e in fewer}


def test_the_fraction_holds_on_average_and_depends_on_the_seed() -> None:
    examples = pairs([f"prompt {n}" for n in range(4000)])
    tests = [split_by_prompt(examples, test_fraction=0.1, seed=s)[1] for s in (0, 1)]
    assert all(330 < len(test) < 470 for test in tests)  # 400, standard deviation 19
    assert tests[0] != tests[1]
    assert split_by_prompt(examples, test_fraction=0, seed=0)[1] == ()
    assert split_by_prompt(examples, test_fraction=1, seed=0)[0] == ()


def test_what_a_prompt_is() -> None:
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )
    assert prompt_key(SFTExample(id="x", messages=turns)) == "q"
    assert prompt_key(SFTExample(id="x", prompt="q ", completion="a")) == "q"
    assert prompt_key(SFTExample(id="x", text="t")) == "t"
    assert prompt_key(PromptExample(id="x", prompt=turns[1:2])) == "q"
    assert prompt_key(PromptExample(id="x", prompt=turns)) == "system: s\n\nuser: q\n\nassistant: a"


def test_hhh_and_rewardbench(tmp_path) -> None:
    hhh = {"input": "Is it safe?", "targets": {"choices": ["No.", "Sure!"], "labels": [1, 0]}}
    bench = {"input": "Is it safe?", "target_scores": {"Sure!": 0, "No.": 1}}
    dialogue = hhh | {"input": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Safe?\n\nAssistant:"}
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "refusals", "chosen_model": "m"}
    source = write(tmp_path / "d.jsonl", [json.dumps(r) for r in (hhh, bench, dialogue, row)])
    first, second, third, fourth = load_examples([source], kind="preference").examples
    assert first.prompt == ({"role": "user", "content": "Is it safe?"},)
    assert first.chosen == second.chosen == ({"role": "assistant", "content": "No."},)
    assert first.rejected == second.rejected == ({"role": "assistant", "content": "Sure!"},)
    assert [t["role"] for t in third.prompt] == ["user", "assistant", "user"]
    assert (first.source, fourth.source) == (source.path, "refusals")
    undecided = {"input": "x", "targets": {"choices": ["a", "b"], "labels": [1, 1]}}
    uneven = {"input": "x", "targets": {"choices": ["a", "b"], "labels": [1]}}
    for wrong in (undecided, uneven):
        with pytest.raises(AlignError, match="targets"):
            load_examples([write(tmp_path / "e.jsonl", [json.dumps(wrong)])], kind="preference")
