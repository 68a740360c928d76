from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from sacrebleu import sentence_chrf
from transformers import AutoTokenizer

from align.config.keys import GenerateRecipe, PairsConfig, RewardRecipe
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.stages import generate, reward_model
from align.stages.generate import make_pairs
from align.types import AlignError

Row = dict[str, Any]
ReadJsonl = Callable[[Path], list[Row]]
RunGenerate = Callable[..., Path]


def sample(response: str, score: float, *, finished: bool = True, id: str = "p:1") -> Row:
    prompt = f"prompt of {id}"
    return {
        "id": id,
        "prompt": prompt,
        "response": response,
        "score": score,
        "finished": finished,
    }


def texts(pairs: list[Row]) -> list[tuple[str, str, float]]:
    return [(p["chosen"], p["rejected"], p["margin"]) for p in pairs]


# ---------------------------------------------------------------- pairs of given samples


def test_best_against_worst_of_each_prompt() -> None:
    rows = [
        sample("b", 2.0),
        sample("a", 5.0),
        sample("c", 1.0),
        sample("x", 0.0, id="p:2"),
        sample("z", -4.0, id="p:2"),
        sample("y", -1.0, id="p:2"),
    ]
    pairs, left_out = make_pairs(rows, 3, PairsConfig())
    assert texts(pairs) == [("a", "c", 4.0), ("x", "z", 4.0)]
    assert [(p["id"], p["prompt"]) for p in pairs] == [
        ("p:1", "prompt of p:1"),
        ("p:2", "prompt of p:2"),
    ]
    assert left_out == {}


def test_all_pairs_that_differ_enough() -> None:
    rows = [sample("b", 2.0), sample("a", 5.0), sample("c", 1.0)]
    pairs, left_out = make_pairs(rows, 3, PairsConfig(choose="all", min_margin=3.0))
    assert texts(pairs) == [("a", "b", 3.0), ("a", "c", 4.0)]
    assert left_out == {"scores too close": 1}


def test_unfinished_and_empty_samples_are_never_used() -> None:
    rows = [sample("a", 9.0, finished=False), sample(" ", 8.0), sample("b", 2.0), sample("c", 1.0)]
    pairs, left_out = make_pairs(rows, 4, PairsConfig())
    assert texts(pairs) == [("b", "c", 1.0)]
    assert left_out == {}


def test_what_makes_no_pair_is_counted() -> None:
    rows = [
        sample("a", 1.0),
        sample("b", 1.0),  # a tie
        sample("a", 1.0, id="p:2"),
        sample("a", 1.0, id="p:2"),  # one text
        sample("a", 2.0, id="p:3"),
        sample("b", 1.0, finished=False, id="p:3"),
        sample("a", 2.0, id="p:4"),
        sample("b", 1.5, id="p:4"),
    ]
    pairs, left_out = make_pairs(rows, 2, PairsConfig(min_margin=1.0))
    assert pairs == []
    assert left_out == {
        "scores too close": 2,
        "the same text twice": 1,
        "fewer than two finished samples": 1,
    }


# ---------------------------------------------------------------- the stage


@pytest.fixture
def run_generate(
    tiny_sft: Path,
    tmp_path: Path,
    make_recipe: Callable[..., GenerateRecipe],
    write_rows: Callable[..., Path],
    demonstrations: list[Row],
) -> RunGenerate:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations[:12]]
    tree = {
        "model": str(tiny_sft),
        "data": {"train": str(write_rows("prompts.jsonl", rows))},
        "precision": "fp32",
        "generation": {"max_new_tokens": 16, "samples_per_prompt": 4, "slots": 8},
        "reward": {"metric": "chrf"},
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        generate.run(make_recipe(GenerateRecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def test_samples_with_scores(run_generate: RunGenerate, read_jsonl: ReadJsonl) -> None:
    folder = run_generate("run")
    rows = read_jsonl(folder / "samples.jsonl")
    # every prompt, in order: nothing is held out
    assert [len(list(g)) for _, g in groupby(rows, key=lambda r: r["id"])] == [4] * 12
    for row in rows:
        want = sentence_chrf(row["response"], row["references"]).score
        assert row["score"] == pytest.approx(want, abs=1e-9)
        assert "</s>" not in row["response"]
    assert 0 < sum(r["finished"] for r in rows) < len(rows)
    assert not (folder / "pairs.jsonl").exists()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"


def test_pairs_are_what_the_reward_model_reads(
    run_generate: RunGenerate,
    read_jsonl: ReadJsonl,
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., RewardRecipe],
) -> None:
    folder = run_generate("run", "pairs.min_margin=1")
    samples, pairs = (read_jsonl(folder / f"{n}.jsonl") for n in ("samples", "pairs"))
    want, left_out = make_pairs(samples, 4, PairsConfig(min_margin=1.0))
    assert pairs == want
    assert len(pairs) >= 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["pairs"], manifest["left_out"]) == (len(pairs), left_out)
    source = DataSource(path=str(folder / "pairs.jsonl"))
    examples = load_examples([source], kind="preference").examples
    assert [e.margin for e in examples] == [p["margin"] for p in pairs]  # type: ignore[union-attr]
    tree = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "rm"),
        "data": {"train": str(folder / "pairs.jsonl"), "test_fraction": 0},
        "precision": "fp32",
        "train": {"max_steps": 1},
    }
    reward_model.run(make_recipe(RewardRecipe, tree))
    assert (tmp_path / "rm" / "model" / "config.json").is_file()


def test_turns_go_in_and_come_out(
    run_generate: RunGenerate,
    read_jsonl: ReadJsonl,
    tiny_chat: Path,
    write_rows: Callable[..., Path],
) -> None:
    turns = [{"role": "user", "content": "red cat?"}]
    path = write_rows("chat.jsonl", [{"prompt": turns}])
    folder = run_generate("run", f"model={tiny_chat}", f"data={path}", "reward=[]")
    rows = read_jsonl(folder / "samples.jsonl")
    assert [r["prompt"] for r in rows] == [turns] * 4
    assert all("score" not in r for r in rows)
    assert not any(r["response"].endswith("<|im_end|>") for r in rows)


def test_the_models_own_end_tokens_end_a_response_and_are_no_text(
    run_generate: RunGenerate, tiny_sft: Path, tmp_path: Path, read_jsonl: ReadJsonl
) -> None:
    """``generation_config`` may name ends that the tokenizer does not know of."""
    model = Path(shutil.copytree(tiny_sft, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["s", "d", "b"])]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rows = read_jsonl(run_generate("run", f"model={model}") / "samples.jsonl")
    finished = [r["response"] for r in rows if r["finished"]]
    assert len(finished) > 10
    for response in finished:
        ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        assert not ids or ids[-1] not in ends


def test_the_seed_decides(run_generate: RunGenerate, read_jsonl: ReadJsonl) -> None:
    first, again, other = run_generate("a"), run_generate("b"), run_generate("c", "seed=1")
    found = [
        [r["response"] for r in read_jsonl(f / "samples.jsonl")] for f in (first, again, other)
    ]
    assert found[0] == found[1] != found[2]


def test_nothing_is_written_twice(run_generate: RunGenerate, read_jsonl: ReadJsonl) -> None:
    folder = run_generate("run", "pairs.min_margin=1")
    before = [read_jsonl(folder / f"{n}.jsonl") for n in ("samples", "pairs")]
    with pytest.raises(AlignError, match="already holds a run"):
        run_generate("run")
    with pytest.raises(AlignError, match="generate has no checkpoints"):
        run_generate("run", "pairs.min_margin=1", "resume=auto")
    run_generate("run", "pairs.min_margin=1", "overwrite=true")
    assert [read_jsonl(folder / f"{n}.jsonl") for n in ("samples", "pairs")] == before


def test_no_pair_at_all_says_why(run_generate: RunGenerate) -> None:
    with pytest.raises(AlignError, match=r"no pairs can be made of 48 samples: .*too close"):
        run_generate("run", "pairs.min_margin=101")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("pairs.min_margin=1", r"48 samples: fewer than two finished samples \(12\); raise gen"),
        ("best_of_n=true", r"best_of_n: none of 48 samples ended .*; raise generation.max_new_tok"),
    ],
)
def test_samples_that_are_all_cut_off_are_an_error(
    option: str, match: str, run_generate: RunGenerate, tmp_path: Path
) -> None:
    with pytest.raises(AlignError, match=match):
        run_generate("run", option, "generation.max_new_tokens=1")
    assert not (tmp_path / "run" / "best.jsonl").exists()


def test_pairs_need_a_reward(run_generate: RunGenerate, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="reward"):
        run_generate("run", "pairs.min_margin=1", "reward=[]")
    assert not (tmp_path / "run").exists()


def test_two_models_answer_the_same_prompts(
    run_generate: RunGenerate, read_jsonl: ReadJsonl, tiny: Path, tiny_sft: Path
) -> None:
    alone, both = run_generate("alone"), run_generate("both", f"also=[{tiny}]", "pairs.choose=all")
    rows = read_jsonl(both / "samples.jsonl")
    # the second model changes nothing of what the first one writes
    first = [{k: v for k, v in r.items() if k != "model"} for r in rows if r["model"] != str(tiny)]
    assert first == read_jsonl(alone / "samples.jsonl")
    for _, same in groupby(rows, key=lambda r: r["id"]):
        assert [r["model"] for r in same] == [str(tiny_sft)] * 4 + [str(tiny)] * 4
    assert read_jsonl(both / "pairs.jsonl") == make_pairs(rows, 8, PairsConfig(choose="all"))[0]


def test_best_of_n_is_what_sft_reads(run_generate: RunGenerate, read_jsonl: ReadJsonl) -> None:
    folder = run_generate("run", "best_of_n=true")
    rows, best = (read_jsonl(folder / f"{name}.jsonl") for name in ("samples", "best"))
    assert len(best) >= 6
    for row in best:
        scores = [r["score"] for r in rows if r["id"] == row["id"] and r["finished"]]
        assert row["score"] == max(scores)
    examples = load_examples([DataSource(path=str(folder / "best.jsonl"))], kind="sft").examples
    assert [e.completion for e in examples] == [r["completion"] for r in best]
