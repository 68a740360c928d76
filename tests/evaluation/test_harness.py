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

from align.config.keys import EvalRecipe, RewardRecipe, SFTRecipe
from align.config.load import load_recipe
from align.evaluation import harness
from align.stages import sft
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


def keys_of(value: Any) -> set[str]:
    """Every key of nested objects."""
    if isinstance(value, dict):
        return set(value).union(*(keys_of(v) for v in value.values()))
    return set().union(*(keys_of(v) for v in value)) if isinstance(value, list) else set()


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
        *("bleu", "chrf", "chrf++", "ter", "reward", "sample_chrf", "sample_reward"),
        *("length", "repetition_4"),
    }
    for comparison in compared:
        assert 0 <= comparison["p"] <= 1
    (bleu_difference,) = [c["difference"] for c in compared if c["metric"] == "bleu"]
    assert bleu_difference == pytest.approx(after["bleu"] - start["bleu"])


def test_every_key_is_explained_and_everything_can_be_asked_for(
    run_eval: RunEval,
    tiny: Path,
    tiny_sft: Path,
    preferences: list[Row],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two seeds, gold, judge, best-of-n, own metrics, preferences: all there is in one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "eval_own.py").write_text(
        "import datasets, evaluate\n"
        "def words(prompts, responses, references):\n"
        "    return [float(len(r.split())) for r in responses]\n"
        "def longer(prompts, a, b, references):\n"
        "    return [(1 + (len(x) > len(y)) - (len(x) < len(y))) / 2 for x, y in zip(a, b)]\n"
        "class Shout(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('string')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions):\n"
        "        return {'shout': sum(map(str.isupper, predictions)) / len(predictions)}\n"
    )
    pairs = write_rows("pairs.jsonl", preferences)
    folder = run_eval(
        "run",
        f"models={{start: {tiny}, sft#0: {tiny_sft}, sft#1: {tiny_sft}}}",
        f"reference_model={tiny_sft}",
        "reward={function: eval_own:words}",
        "gold_reward={metric: chrf}",
        "sampling={samples_per_prompt: 2, max_new_tokens: 10}",
        "metrics=[bleu, bleu-char, ter, 'eval_own:words', 'eval_own:Shout']",
        "judge=eval_own:longer",
        "best_of_n=3",
    )
    found = results(folder)
    explained = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text(encoding="utf-8")
    own = {"words_mean", "words_ci95", "shout"}
    of_another = {f"bleu-char{end}" for end in ("", "_signature", "_ci95")}
    unexplained = {k for k in keys_of(found) - own - of_another if f"`{k}`" not in explained}
    assert unexplained == set()
    names = [m["name"] for m in found["models"]]
    assert names == ["start", "sft#0", "sft#1", "best-of-3"]
    start, first, second, best = found["models"]
    assert "tok:char" in first["bleu-char_signature"]
    assert {**first, "name": ""} == {**second, "name": ""}  # the same model twice
    assert first["words_mean"] == first["reward_mean"]
    assert first["shout"] == 0
    assert first["perplexity"] < start["perplexity"]
    assert 0 < first["bits_per_byte"] < start["bits_per_byte"]
    assert best["reward_mean"] > first["sample_reward_mean"]
    assert best["kl"] == pytest.approx(np.log(3) - 2 / 3)
    curve = found["best_of_n"]
    assert [c["n"] for c in curve] == [1, 2, 3]
    assert curve[0]["reward"] < curve[1]["reward"] < curve[2]["reward"]
    assert curve[2]["reward"] == pytest.approx(best["reward_mean"])
    (pooled,) = found["pooled"]
    assert (pooled["name"], pooled["seeds"]) == ("sft", 2)
    assert pooled["figures"]["bleu"]["std"] == 0
    compared = {(c["a"], c["b"]) for c in found["comparisons"]}
    assert ("sft", "start") in compared
    judges = {w["judge"] for w in found["win_rates"]}
    assert judges == {"eval_own:words", "chrf", "eval_own:longer"}
    for w in found["win_rates"]:
        assert w["wins"] + w["ties"] + w["losses"] == 12

    # a reward without references on held-out pairs, and nothing else
    judged = run_eval(
        "judged",
        f"preferences.test={pairs}",
        "reward={function: eval_own:words}",
        "gold_reward={function: eval_own:words}",
        "data=null",
    )
    reward = results(judged)["reward_model"]
    assert {k for k in keys_of(reward) if f"`{k}`" not in explained} == {str(pairs)}
    assert reward["pairs"] == len(preferences)
    gaps = [len(p["chosen"].split()) - len(p["rejected"].split()) for p in preferences]
    assert reward["gaps"] == gaps
    assert reward["accuracy"] == pytest.approx(np.mean([(g > 0) + 0.5 * (g == 0) for g in gaps]))
    assert len(reward["by_margin"]) == 4
    assert reward["broken"]["repeated"]["preferred"] == 1
    assert reward["broken"]["shuffled"]["score_change"] == 0
    assert reward["gold"]["kendall"] == pytest.approx(1)
    # a part of the training file: the rows that a reward model with this seed and fraction held out
    split = [f"preferences.train={pairs}", "preferences.test_fraction=0.4"]
    part = run_eval("part", *split, "reward={function: eval_own:words}", "data=null")
    assert 0 < results(part)["reward_model"]["pairs"] < len(preferences)
    # as both shipped suites have it: pairs have no references, so a metric says nothing of them
    own, gold = "reward={function: eval_own:words}", "gold_reward={metric: chrf1}"
    shipped = run_eval("shipped", f"preferences.test={pairs}", own, gold, "num_resamples=10")
    assert "gold" not in results(shipped)["reward_model"]


def test_outputs_are_kept(
    run_eval: RunEval, tiny_sft: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second evaluation with another metric samples nothing; other sampling samples anew."""
    from align.evaluation import outputs

    original, calls = outputs.sample, []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(args[2].temperature)
        return original(*args, **options)

    monkeypatch.setattr(outputs, "sample", counting)
    sampled = "sampling={samples_per_prompt: 2, max_new_tokens: 10}"
    first = results(run_eval("a", f"model={tiny_sft}", f"reference_model={tiny_sft}", sampled))
    assert calls == [0, 1]
    again = f"model={tiny_sft}", f"reference_model={tiny_sft}", "reward={metric: chrf1}"
    second = results(run_eval("b", *again, sampled, "metrics=[chrf]", "sampling.slots=2"))
    assert calls == [0, 1]
    for key in ("chrf", "kl", "length_mean", "sample_chrf_mean", "perplexity"):
        assert second["models"][0][key] == pytest.approx(first["models"][0][key])
    run_eval("c", *again, "sampling={samples_per_prompt: 2, max_new_tokens: 9}")
    assert calls == [0, 1, 1]
    run_eval("d", *again, "seed=1", sampled)  # greedy outputs have no seed
    assert calls == [0, 1, 1, 1]
    run_eval("e", *again, "cache_outputs=false")
    assert calls == [0, 1, 1, 1, 0]
    for path in (tmp_path / "outputs_cache").iterdir():
        path.write_bytes(b"cut short")
    run_eval("f", *again)
    assert calls == [0, 1, 1, 1, 0, 0]


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


def test_adapters_and_checkpoints_are_models(
    run_eval: RunEval,
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Any],
    write_rows: Callable[..., Path],
    demonstrations: list[Row],
) -> None:
    """An adapter alone, the merged model and the last checkpoint of the same run say the same."""
    tree = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "lora"),
        "data": {"train": str(write_rows("d.jsonl", demonstrations)), "test_fraction": 0.0},
        "train": {"max_steps": 4, "save_every": 2},
        "optim": {"lr": 0.02},
        "lora": {"r": 4},
        "precision": "fp32",
    }
    sft.run(make_recipe(SFTRecipe, tree))
    lora = tmp_path / "lora"
    models = {
        "merged": lora / "model",
        "adapter": lora / "model_adapter",
        "step-2": lora / "checkpoints" / "step-2",
        "step-4": lora / "checkpoints" / "step-4",
        "base": tiny,
    }
    named = ", ".join(f"{name}: {path}" for name, path in models.items())
    found = {m["name"]: m for m in results(run_eval("run", f"models={{{named}}}"))["models"]}
    merged = found["merged"]["perplexity"]
    assert found["adapter"]["perplexity"] == pytest.approx(merged, rel=1e-4)
    assert found["step-4"]["perplexity"] == pytest.approx(merged, rel=1e-4)
    assert found["base"]["perplexity"] > found["step-2"]["perplexity"] > merged
    wrong = tmp_path / "wrong" / "checkpoints" / "step-1"
    wrong.mkdir(parents=True)
    (wrong / "state.json").write_text("{}")
    with pytest.raises(AlignError, match="not of a run of sft, dpo or ppo"):
        run_eval("wrong_eval", f"model={wrong}")


@pytest.mark.parametrize("suite", ["tiny", "smollm2"])
def test_shipped_evaluations_judge_what_the_reward_model_held_out(suite: str) -> None:
    judged = load_recipe(EvalRecipe, f"{suite}/eval")
    trained = load_recipe(RewardRecipe, f"{suite}/rm")
    assert judged.preferences.train == trained.data.train
    assert judged.preferences.test_fraction == trained.data.test_fraction
    assert judged.seed == trained.seed
