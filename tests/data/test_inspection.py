"""``align data check`` finds each thing that it claims to find, and is silent on clean data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from align.config.sections import DataSource
from align.data.inspect.check import Inspection, inspect
from align.data.inspect.findings import PLACES
from align.data.inspect.oddities import oddities, script
from align.data.tokens.findings import _pieces
from align.types import AlignError

SHIPPED = Path(__file__).parents[2] / "data" / "kjv_web"
# as many longer as shorter answers are chosen
CLEAN = [
    {"prompt": f"q{n}", "chosen": "yes", "rejected": "no" if n % 2 else "never"} for n in range(8)
]


def write(path: Path, rows: list[dict]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def levels(found: Inspection) -> dict[str, tuple[str, int]]:
    return {f.what.split(":")[0]: (f.level, f.count) for f in found.findings}


def test_clean_pairs_have_one_note_about_their_lengths(tmp_path) -> None:
    found = inspect([write(tmp_path / "d.jsonl", CLEAN)])
    assert (found.kind, found.num_examples) == ("preference", 8)
    assert found.formats == {f"{tmp_path}/d.jsonl": "prompt + chosen + rejected"}
    (only,) = found.findings
    assert (only.level, only.count) == ("note", 8)
    assert only.what.startswith("the longer answer is chosen in 50.0% +- 35.4% of pairs")
    assert found.worst() == "note"


def test_cells_that_other_readers_take_for_missing_are_counted(tmp_path) -> None:
    rows = [("a", "b"), ("c", "NA"), ("d", "null"), ("None of them", "e NA")]
    table = tmp_path / "d.csv"
    table.write_text("prompt,completion\n" + "".join(f"{p},{c}\n" for p, c in rows))
    what = "a cell of NA, NaN, null or None alone, which is read as that word"
    assert levels(inspect([DataSource(path=str(table))]))[what] == ("warning", 2)
    lines = [{"prompt": p, "completion": c} for p, c in rows]
    assert what not in levels(inspect([write(tmp_path / "d.jsonl", lines)]))


def test_contradictions_duplicates_and_bad_rows(tmp_path) -> None:
    rows = [
        *CLEAN,
        {"prompt": "q0", "chosen": "never", "rejected": "yes"},
        CLEAN[1],
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "no"},
    ]
    source = write(tmp_path / "d.jsonl", rows)
    found = inspect([source])
    said = levels(found)
    assert said["contradictory pairs"] == ("error", 2)
    assert said["duplicated rows"] == ("warning", 1)
    bad = {f.what: f.count for f in found.findings if f.what.startswith("bad rows")}
    assert bad == {
        "bad rows: rejected: is the same as chosen": 1,
        "bad rows: chosen: empty": 1,
    }
    assert found.worst() == "error"
    duplicate = next(f for f in found.findings if f.what == "duplicated rows")
    assert duplicate.places == (f"{source.path}:10 repeats {source.path}:2",)


def test_rows_that_differ_in_their_calls_are_no_duplicates(tmp_path) -> None:
    def row(city: str) -> dict:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        asked = {"role": "user", "content": "Weather?"}
        return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [row("Rome"), row("Oslo"), row("Rome")]
    (found,) = inspect([write(tmp_path / "d.jsonl", rows)]).findings
    assert (found.what, found.count) == ("duplicated rows", 1)


def test_every_reason_of_bad_rows_has_a_place(tmp_path) -> None:
    same = {"prompt": "q", "chosen": "same", "rejected": "same"}
    odd = [{"prompt": 5, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a"}]
    source = write(tmp_path / "d.jsonl", [*CLEAN, *[same] * 6, *odd])
    bad = [f for f in inspect([source]).findings if f.what.startswith("bad rows")]
    assert [f.count for f in bad] == [6, 1, 1]
    last = len(CLEAN) + 8
    assert bad[2].places[0].startswith(f"{source.path}:{last}: rejected")
    assert bad[1].places[0].startswith(f"{source.path}:{last - 1}: prompt")


def test_a_conversation_that_ends_in_a_question_is_noted(tmp_path) -> None:
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [asked, answered]},
        {"messages": [{**asked, "content": "other"}, answered, asked]},
    ]
    source = write(tmp_path / "d.jsonl", rows)
    (found,) = inspect([source]).findings
    assert (found.level, found.count, found.places) == ("note", 1, (f"{source.path}:2",))
    assert "nothing is trained on the last" in found.what


def test_a_length_bias_is_a_warning(tmp_path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "longer", "rejected": "short"} for n in range(20)]
    (found,) = inspect([write(tmp_path / "d.jsonl", rows)]).findings
    assert (found.level, found.what[:40]) == ("warning", "the longer answer is chosen in 100.0% +-")


def test_prompts_on_both_sides_are_found_whatever_their_spacing(tmp_path) -> None:
    train = write(tmp_path / "d.jsonl", CLEAN)
    test = write(tmp_path / "t.jsonl", [{"prompt": " Q3 "}, {"prompt": "new"}])
    found = inspect([train], test=[test])
    assert levels(found)["held-out prompts that are trained on"] == ("error", 1)
    leak = next(f for f in found.findings if f.level == "error")
    assert leak.places == (f"{test.path}:1 is also {train.path}:4",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("caf\ufffd", "a replacement character"),
        ("CafÃ© and donâ€™t", "mojibake"),
        ("bell\x07", "a control character"),
        ("zero\u200bwidth", "an invisible"),
        ("private \ue123", "a private-use"),
        ("a\r\nb", "Windows line ends"),
        ("salt &amp; pepper", "HTML entities"),
        ("<image>What is it?", "a placeholder of an image"),
        ("<|image_1|>\nWhat is it?", "a placeholder of an image"),
        ("cafe\u0301", "letters and accents written apart"),
    ],
)
def test_oddities_are_named(text: str, said: str) -> None:
    (found,) = oddities(text)
    assert found.startswith(said)


def test_ordinary_texts_are_not_odd() -> None:
    lines = (SHIPPED / "dev.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["source_text"] for line in lines]
    more = ["Ça déjà vu, Ärger & co", "naïve “quotes” – dash…", "日本語の文", "👩‍👩‍👧 family"]
    assert [t for t in (*texts, *more) if oddities(t)] == []


def test_scripts() -> None:
    assert script("Добрый день, товарищи") == "CYRILLIC"
    assert script("これは日本語の文です。長い文") in ("HIRAGANA", "CJK")
    assert script("Café au lait, s'il vous plaît") == "LATIN"
    assert script("short") is None


def test_a_row_in_another_script_is_noted(tmp_path) -> None:
    rows = [{"text": f"plain English text number {n}"} for n in range(5)]
    found = inspect([write(tmp_path / "d.jsonl", [*rows, {"text": "Совсем другой язык"}])])
    (note,) = found.findings
    assert note.what == "rows written mostly in CYRILLIC, where most are in LATIN"


# ---------------------------------------------------------------- tokens


def test_tokens_that_are_trained_on_and_their_text(tmp_path, chatml) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi é"},
        ]
    }
    found = inspect([write(tmp_path / "d.jsonl", [row])], tokenizer=chatml)
    (shown,) = found.shown
    ((_, tokens),) = shown.parts
    assert "".join(t for t, trained in tokens if trained) == "Hi é<|im_end|>"
    whole = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi é<|im_end|>"
    assert "".join(t for t, _ in tokens) == whole
    assert found.tokens["trained"] == sum(trained for _, trained in tokens)


def test_pieces_of_a_character_are_put_together(plain) -> None:
    ids = plain("日本é", add_special_tokens=False)["input_ids"]
    import numpy as np

    pieces = _pieces(plain, np.array(ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "日本é"


def test_special_tokens_in_the_text_are_errors(tmp_path, plain) -> None:
    rows = [
        {"prompt": "q", "chosen": "yes</s>and on", "rejected": "no"},
        {"prompt": "<s>q <s>", "chosen": "yes", "rejected": "no"},
        {"prompt": "q<pad>", "chosen": "yes", "rejected": "no"},
        {"prompt": "fine", "chosen": "yes", "rejected": "no"},
    ]
    said = levels(inspect([write(tmp_path / "d.jsonl", rows)], tokenizer=plain))
    assert said["rows with an end token in the middle, after which the model would stop"][1] == 1
    assert said["rows with BOS more than once"] == ("error", 1)
    assert said["rows that spell out the pad token"] == ("warning", 1)


def test_rows_over_length_and_turns_without_a_template(tmp_path, plain) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"prompt": "short", "completion": "one"},
        {"prompt": "q " * 50, "completion": "one"},
    ]
    found = inspect([write(tmp_path / "d.jsonl", rows)], tokenizer=plain, max_tokens=40)
    assert levels(found)["rows over data.max_tokens=40, which are never cut"] == ("error", 1)
    assert found.tokens["rows"] == 1
    chat = write(tmp_path / "c.jsonl", [{"messages": turns}])
    (error,) = inspect([chat], tokenizer=plain).findings
    assert error.what == "the tokenizer has no chat template but the data are turns"


def test_strings_for_a_chat_model_are_noted(tmp_path, chatml) -> None:
    strings = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a"}])
    (note,) = inspect([strings], tokenizer=chatml).findings
    assert note.what.startswith("rows of strings for a model with a chat template")
    marked = {"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": "a"}
    assert inspect([write(tmp_path / "m.jsonl", [marked])], tokenizer=chatml).findings == ()


# ---------------------------------------------------------------- the command


def test_exit_codes_and_json(tmp_path, capsys) -> None:
    clean = write(tmp_path / "d.jsonl", CLEAN).path
    assert main(["data", "check", clean]) == 0
    page = capsys.readouterr().out
    assert f"{clean}: read as preference, format: prompt + chosen + rejected" in page
    assert "0 errors, 0 warnings, 1 notes" in page
    warned = write(tmp_path / "w.jsonl", [*CLEAN, CLEAN[0]]).path
    assert main(["data", "check", warned]) == 0
    assert main(["data", "check", warned, "--strict"]) == 1
    capsys.readouterr()
    wrong = {"prompt": "q0", "chosen": "never", "rejected": "yes"}
    assert main(["data", "check", write(tmp_path / "e.jsonl", [*CLEAN, wrong]).path, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["level"] == "error"
    assert len(found["findings"][0]["places"]) <= PLACES


def test_rows_are_shown_with_a_model(capsys) -> None:
    tiny = Path(__file__).parents[2] / "models" / "tiny"
    assert main(["data", "check", str(SHIPPED / "sft.jsonl"), "--model", str(tiny)]) == 0
    page = capsys.readouterr().out
    assert page.count("Rewrite in modern English:↵") == 5
    assert page.count("<|endoftext|>") == 5


def test_users_mistakes(tmp_path, capsys) -> None:
    clean = write(tmp_path / "d.jsonl", CLEAN)
    texts = write(tmp_path / "t.jsonl", [{"text": "t"}])
    with pytest.raises(AlignError, match="the files are of different kinds"):
        inspect([clean, texts])
    assert main(["data", "check", clean.path, "--columns", "prompt"]) == 2
    assert "wanted ours=theirs" in capsys.readouterr().err


def test_convert_writes_a_new_file_only(tmp_path, capsys) -> None:
    source, out = write(tmp_path / "d.jsonl", CLEAN).path, tmp_path / "o.jsonl"
    assert main(["data", "convert", source, "--to", "messages", "-o", str(out)]) == 0
    assert f"{out}: 8 rows (preference), as messages" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows[0]["prompt"] == [{"role": "user", "content": "q0"}]
    assert main(["data", "convert", source, "--to", "hh", "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "convert", source, "--to", "hh", "-o", str(tmp_path / "x.json")]) == 2
    empty = write(tmp_path / "e.jsonl", [*CLEAN, {**CLEAN[0], "chosen": ""}]).path
    more = ["--to", "hh", "-o", str(tmp_path / "hh.jsonl"), "--skip-bad-rows"]
    assert main(["data", "convert", empty, *more]) == 0
    assert "left out 1 rows: chosen: empty" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["response", "answer"])
def test_an_answer_that_prompts_do_not_read_is_told(tmp_path, column) -> None:
    source = write(
        tmp_path / "d.jsonl", [{"prompt": "q", column: "x"}, {"prompt": "r", column: "y"}]
    )
    (finding,) = inspect([source]).findings
    assert finding.level == "warning"
    assert finding.what == f"column {column} is not read: rows are taken for prompts alone"
    assert f"--kind sft --columns completion={column}" in finding.advice
    assert inspect([source], kind="prompt").findings == ()
    as_references = DataSource(path=source.path, columns={"references": column})
    assert inspect([as_references]).findings == ()


def test_references_of_prompts_are_no_finding(tmp_path) -> None:
    rows = [{"prompt": f"q{n}", "references": ["x"], "source": "s"} for n in range(2)]
    assert inspect([write(tmp_path / "d.jsonl", rows)]).findings == ()


def test_an_unusual_role_is_told(tmp_path) -> None:
    answer = {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [{"role": role, "content": role}, answer]}
        for role in ("user", "tool", "banana")
    ]
    source = write(tmp_path / "d.jsonl", rows)
    (finding,) = inspect([source]).findings
    assert (finding.level, finding.what) == ("warning", "role 'banana' is an unusual one")
    assert finding.places == (f"{source.path}:3",)
