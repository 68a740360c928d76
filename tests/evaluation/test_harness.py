from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config import EvalRecipe
from align.evaluation import harness
from align.types import AlignError

Row = dict[str, Any]
ReadJsonl = Callable[[Path], list[Row]]
RunEval = Callable[..., Path]


@pytest.fixture
def prompts(demonstrations: list[Row]) -> list[Row]:
    """Twelve prompts with one or two references, and what the task rewrites."""
    return [
        {
            "prompt": row["prompt"],
            "references": [row["completion"], "good dog sun"][: 1 + number % 2],
            "source_text": f"{row['completion']} one",
        }
        for number, row in enumerate(demonstrations[:12])
    ]


@pytest.fixture
def run_eval(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., EvalRecipe],
    write_rows: Callable[..., Path],
    prompts: list[Row],
) -> RunEval:
    tree = {
        "data": str(write_rows("prompts.jsonl", prompts)),
        "precision": "fp32",
        "generation": {"temperature": 0, "max_new_tokens": 10},
        "num_resamples": 50,
    }

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        harness.run(make_recipe(EvalRecipe, tree, f"output_dir={folder}", *overrides))
        return folder

    return run


def results(folder: Path) -> Row:
    return json.loads((folder / "eval.json").read_text())


def references(prompts: list[Row]) -> list[list[str]]:
    """sacreBLEU's streams: the n-th reference of every segment, missing ones None."""
    return [[(p["references"] + [None])[i] for p in prompts] for i in range(2)]  # type: ignore


def test_the_contract(
    run_eval: RunEval, tiny: Path, tiny_sft: Path, prompts: list[Row], read_jsonl: ReadJsonl
) -> None:
    folder = run_eval(
        "run",
        f"models={{start: {tiny}, trained: {tiny_sft}}}",
        f"reference_model={tiny}",
        "reward={metric: chrf}",
        "sampling={samples_per_prompt: 3, max_new_tokens: 10}",
    )
    found = results(folder)
    assert {"models", "comparisons", "copy_baseline"} <= found.keys()
    needed = {
        "name",
        "bleu",
        "bleu_signature",
        "chrf",
        "chrf_signature",
        "reward_mean",
        "reward_ci95",
        "kl",
        "length_mean",
        "eos_rate",
        "sample_chrf_mean",
        "sample_reward_mean",
    }
    assert [m["name"] for m in found["models"]] == ["start", "trained"]
    for model in found["models"]:
        assert needed <= model.keys()
        rows = read_jsonl(folder / "outputs" / f"{model['name']}.jsonl")
        assert {"prompt", "response", "references", "reward"} <= rows[0].keys()
        assert [r["prompt"] for r in rows] == [p["prompt"] for p in prompts]
        assert [r["references"] for r in rows] == [p["references"] for p in prompts]
        answers = [r["response"] for r in rows]
        bleu = sacrebleu.corpus_bleu(answers, references(prompts))
        chrf = sacrebleu.corpus_chrf(answers, references(prompts))
        assert model["bleu"] == pytest.approx(bleu.score, abs=1e-9)
        assert model["chrf"] == pytest.approx(chrf.score, abs=1e-9)
        assert "tok:13a" in model["bleu_signature"]
        assert "nrefs:var" in model["bleu_signature"]
        sentence = [
            sacrebleu.sentence_chrf(r["response"], p["references"]).score
            for r, p in zip(rows, prompts, strict=True)
        ]
        assert [r["reward"] for r in rows] == pytest.approx(sentence, abs=1e-9)
        assert model["reward_mean"] == pytest.approx(np.mean(sentence))
        low, high = model["reward_ci95"]
        assert low < model["reward_mean"] < high
    start, after = found["models"]
    assert after["bleu"] > start["bleu"] + 5
    # KL to itself is 0, to what it was trained away from it is not; nats per response
    assert start["kl"] == pytest.approx(0, abs=1e-4)
    assert after["kl"] > 1
    compared = [c for c in found["comparisons"] if (c["a"], c["b"]) == ("trained", "start")]
    assert {c["metric"] for c in compared} == {
        "bleu",
        "chrf",
        "reward",
        "sample_chrf",
        "sample_reward",
    }
    for comparison in compared:
        assert 0 <= comparison["p"] <= 1
    (bleu_difference,) = [c["difference"] for c in compared if c["metric"] == "bleu"]
    assert bleu_difference == pytest.approx(after["bleu"] - start["bleu"])


def test_copying_the_input_is_measured(
    run_eval: RunEval, tiny: Path, prompts: list[Row], write_rows: Callable[..., Path]
) -> None:
    found = results(run_eval("run", f"model={tiny}"))
    copies = [p["source_text"] for p in prompts]
    want = sacrebleu.corpus_bleu(copies, references(prompts))
    assert found["copy_baseline"]["bleu"] == pytest.approx(want.score)
    assert want.score > 20
    names = {(c["a"], c["b"]) for c in found["comparisons"]}
    assert names == {(found["models"][0]["name"], harness.COPY)}
    # and not where some prompt has no source text
    without = [{k: v for k, v in prompts[0].items() if k != "source_text"}, *prompts[1:]]
    path = write_rows("without.jsonl", without)
    assert results(run_eval("b", f"model={tiny}", f"data={path}"))["copy_baseline"] is None


def test_greedy_outputs_are_plain_transformers(
    run_eval: RunEval, tiny_sft: Path, prompts: list[Row], read_jsonl: ReadJsonl
) -> None:
    folder = run_eval("run", f"models={{m: {tiny_sft}}}")
    plain = AutoModelForCausalLM.from_pretrained(tiny_sft).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_sft)
    lengths, ended = [], []
    for row in read_jsonl(folder / "outputs" / "m.jsonl"):
        ids = tokenizer(row["prompt"], return_tensors="pt")
        out = plain.generate(**ids, do_sample=False, max_new_tokens=10)[0]
        out = out[ids["input_ids"].shape[1] :].tolist()
        ended.append(out[-1] == tokenizer.eos_token_id)
        lengths.append(len(out))
        assert row["response"] == tokenizer.decode(out[:-1] if ended[-1] else out)
        assert row["finished"] == ended[-1]
    assert any(ended)
    (model,) = results(folder)["models"]
    assert model["length_mean"] == pytest.approx(np.mean(lengths))  # the end token included
    assert model["eos_rate"] == pytest.approx(np.mean(ended))


def test_kl_is_log_p_minus_log_ref_of_the_samples(
    run_eval: RunEval, tiny: Path, tiny_sft: Path, prompts: list[Row], read_jsonl: ReadJsonl
) -> None:
    """Of the outputs themselves, where they were sampled and there are no others."""
    sampled = "generation.temperature=1.0"
    folder = run_eval("run", f"models={{m: {tiny_sft}}}", f"reference_model={tiny}", sampled)
    rows = read_jsonl(folder / "outputs" / "m.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    total = 0.0
    for sign, name in ((1, tiny_sft), (-1, tiny)):
        plain = AutoModelForCausalLM.from_pretrained(name).eval()
        for row in rows:
            before = tokenizer(row["prompt"])["input_ids"]
            end = "</s>" if row["finished"] else ""
            answer = tokenizer(row["response"] + end, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = plain(torch.tensor([before + answer])).logits[0].log_softmax(-1)
            logprobs = logprobs[len(before) - 1 : -1]
            total += sign * logprobs.gather(-1, torch.tensor(answer)[:, None]).sum().item()
    assert results(folder)["models"][0]["kl"] == pytest.approx(total / len(rows), rel=1e-3)


def test_somebody_elses_outputs(
    run_eval: RunEval, tiny: Path, prompts: list[Row], write_rows: Callable[..., Path]
) -> None:
    """JSONL with prompt and response, in any order, beside a model."""
    answers = [{"prompt": p["prompt"], "response": p["references"][0]} for p in prompts]
    path = write_rows("theirs.jsonl", answers[::-1])
    found = results(
        run_eval("run", f"models={{theirs: {path}, m: {tiny}}}", f"reference_model={tiny}")
    )
    theirs, ours = found["models"]
    assert theirs["bleu"] == pytest.approx(100)
    assert theirs["exact_match"] == 1.0
    assert theirs["length_mean"] is theirs["kl"] is theirs["eos_rate"] is None
    assert ours["kl"] is None  # greedy outputs have a log-ratio, and that is no KL
    missing = write_rows("missing.jsonl", answers[:-1])
    with pytest.raises(AlignError, match=r"no response to 1 of 12 prompts.*prompts.jsonl:12"):
        run_eval("b", f"models={{theirs: {missing}}}")
    broken = write_rows("broken.jsonl", [*answers[:2], {"prompt": "x"}])
    with pytest.raises(AlignError, match=r"broken.jsonl:3: has no `response`"):
        run_eval("c", f"models={{theirs: {broken}}}")


def test_prompts_without_references_have_no_bleu(
    run_eval: RunEval, tiny: Path, write_rows: Callable[..., Path]
) -> None:
    path = write_rows("bare.jsonl", [{"prompt": "red "}, {"prompt": "blue "}])
    found = results(run_eval("run", f"model={tiny}", f"data={path}"))
    assert "bleu" not in found["models"][0]
    assert found["models"][0]["length_mean"] > 0
    assert found["comparisons"] == []


def test_turns_are_prompts_too(
    run_eval: RunEval, tiny_chat: Path, write_rows: Callable[..., Path], read_jsonl: ReadJsonl
) -> None:
    turns = [{"role": "user", "content": "red cat?"}]
    path = write_rows("chat.jsonl", [{"prompt": turns, "references": ["good dog"]}])
    folder = run_eval("run", f"models={{m: {tiny_chat}}}", f"data={path}")
    (row,) = read_jsonl(folder / "outputs" / "m.jsonl")
    assert row["prompt"] == turns
    # and outputs of ours can be read back
    again = run_eval("again", f"models={{m: {folder / 'outputs' / 'm.jsonl'}}}", f"data={path}")
    assert results(again)["models"][0]["bleu"] == results(folder)["models"][0]["bleu"]


def test_names_are_file_names(run_eval: RunEval, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="'org/name' names a file"):
        run_eval("run", f"models={{org/name: {tiny}}}")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_is_not_written_over(run_eval: RunEval, tiny: Path) -> None:
    run_eval("run", f"model={tiny}")
    with pytest.raises(AlignError, match="already holds a run"):
        run_eval("run", f"model={tiny}")
    folder = run_eval("run", f"models={{other: {tiny}}}", "overwrite=true")
    assert [p.name for p in (folder / "outputs").iterdir()] == ["other.jsonl"]
