"""``align eval``: one table over one or several checkpoints, on held-out prompts.

BLEU, chrF and reward are measured on ``generation`` (greedy by default); KL to the reference and
the mean of per-sample scores on ``sampling``, if the recipe has it. Every pair of models is
compared prompt by prompt. Copying the input is measured too where the task has a source text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from align.config import EvalRecipe
from align.data.preferences import load_examples, with_columns
from align.data.subset import pick
from align.evaluation.bleu import corpus_bleu, corpus_chrf
from align.evaluation.compare import Comparison, compare_corpus, compare_values, mean_ci95
from align.evaluation.outputs import Answerer, Outputs, Reference, mean, read_outputs
from align.progress import Progress, say, table
from align.recipes_io import to_yaml
from align.rewards import build_reward
from align.rewards.metric import MetricReward
from align.rewards.model import reward_model_loader
from align.run_folder import Run
from align.types import AlignError, PromptExample, RewardSource

COPY = "copy the input"


def run(recipe: EvalRecipe) -> None:
    """Evaluate ``recipe.models`` and write ``eval.json`` and ``outputs/<name>.jsonl``."""
    models = recipe.models or ({Path(recipe.model).name: recipe.model} if recipe.model else {})
    if not models:
        raise AlignError("model: none given; set model=FOLDER, or models to name several")
    for name in models:
        if Path(name).name != name:
            raise AlignError(f"models: {name!r} names a file in outputs/; give it a plain name")
    session = Run(
        "eval",
        recipe.output_dir,
        config_yaml=to_yaml(recipe),
        seed=recipe.seed,
        overwrite=recipe.overwrite,
    )
    examples = _prompts(recipe, session)
    say(f"eval: {len(models)} models on {len(examples)} prompts -> {recipe.output_dir}")
    evaluation = _Evaluation(recipe, examples)
    for name, model in models.items():
        evaluation.measure(name, model)
    results: dict[str, Any] = {
        "models": [row | {"model": models[row["name"]]} for row in evaluation.rows],
        "comparisons": [asdict(c) for c in evaluation.comparisons()],
        "copy_baseline": evaluation.copy_baseline(),
    }
    session.begin()
    for name, rows in evaluation.outputs_rows().items():
        (session.folder / "outputs").mkdir(exist_ok=True)
        session.append(f"outputs/{name}.jsonl", rows)
    path = session.folder / "eval.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say("")
    say(_significance(results["comparisons"], list(models)))
    session.finish(_table(results), prompts=len(examples))


class _Evaluation:
    """Results that pile up model by model."""

    def __init__(self, recipe: EvalRecipe, examples: Sequence[PromptExample]) -> None:
        self.recipe, self.examples = recipe, examples
        state = PartialState()
        if state.num_processes > 1:
            raise AlignError("eval: runs in one process; start it without `accelerate launch`")
        self.device = state.device
        self.references = [e.references for e in examples]
        self.has_references = all(self.references)
        if any(self.references) and not self.has_references:
            bare = [e.id for e in examples if not e.references]
            raise AlignError(
                f"data: {len(bare)} of {len(examples)} rows have no references, the first is "
                f"{bare[0]}; BLEU needs them in every row: add them or leave these rows out"
            )
        self.rows: list[dict[str, Any]] = []
        self.outputs: dict[str, Outputs] = {}
        # metric -> model -> one number per prompt, in the prompts' order
        self.per_prompt: dict[str, dict[str, list[float]]] = {}
        self.reward = self._reward()
        self.reference = None
        if recipe.reference_model is not None:
            self.reference = Reference(self._answerer(recipe.reference_model))

    def measure(self, name: str, model: str) -> None:
        recipe = self.recipe
        if model.endswith(".jsonl"):
            outputs, samples = read_outputs(model, self.examples), None
        else:
            outputs, samples = self._generate(name, model)
        self.outputs[name] = outputs
        row: dict[str, Any] = {"name": name, **self._corpus_scores(outputs)}
        if self.reward is not None:
            scores = self._scored(self.reward, outputs.responses, 1)
            self.per_prompt.setdefault("reward", {})[name] = scores
            row["reward_mean"], row["reward_ci95"] = mean_ci95(scores)
        row["length_mean"] = mean(outputs.lengths)
        row["eos_rate"] = mean(outputs.finished)
        row["kl"] = mean((samples or outputs).kl)
        if samples is not None and recipe.sampling is not None:
            k = recipe.sampling.samples_per_prompt
            row["sample_length_mean"] = mean(samples.lengths)
            row["sample_eos_rate"] = mean(samples.finished)
            if self.has_references:
                scores = self._scored(MetricReward("chrf"), samples.responses, k)
                self._per_sample(row, name, "sample_chrf", scores, k)
            if self.reward is not None:
                scores = self._scored(self.reward, samples.responses, k)
                self._per_sample(row, name, "sample_reward", scores, k)
        self.rows.append(row)

    def comparisons(self) -> list[Comparison]:
        """Every two models, later against earlier, by every metric that both have."""
        options: dict[str, Any] = {"num_resamples": self.recipe.num_resamples}
        named = {name: outputs.responses for name, outputs in self.outputs.items()}
        copied = self._copied()
        if copied is not None:
            named = {COPY: copied, **named}
        found = []
        for a, b in ((a, b) for b, a in combinations(named, 2)):
            for metric in ("bleu", "chrf") if self.has_references else ():
                found.append(
                    compare_corpus(
                        (a, named[a]), (b, named[b]), self.references, metric=metric, **options
                    )
                )
            for metric, values in self.per_prompt.items():
                if a in values and b in values:
                    found.append(
                        compare_values((a, values[a]), (b, values[b]), metric=metric, **options)
                    )
        return found

    def copy_baseline(self) -> dict[str, Any] | None:
        copied = self._copied()
        return None if copied is None else self._corpus_scores(Outputs(copied))

    def outputs_rows(self) -> dict[str, list[dict[str, Any]]]:
        rewards = self.per_prompt.get("reward", {})
        return {
            name: [
                {
                    "id": example.id,
                    "prompt": example.prompt,
                    "response": outputs.responses[i],
                    "references": list(example.references),
                    "reward": rewards[name][i] if name in rewards else None,
                    "finished": None if outputs.finished is None else outputs.finished[i],
                }
                for i, example in enumerate(self.examples)
            ]
            for name, outputs in self.outputs.items()
        }

    def _generate(self, name: str, model: str) -> tuple[Outputs, Outputs | None]:
        recipe, answerer = self.recipe, self._answerer(model)
        total = len(self.examples) * (1 if recipe.sampling is None else 2)
        with Progress(total, f"eval {name}", unit="prompt") as bar:

            def count(tokens: int) -> None:
                bar.advance(steps=0, tokens=tokens)

            options: dict[str, Any] = {
                "seed": recipe.seed,
                "reference": self.reference,
                "on_tokens": count,
            }
            single = replace(recipe.generation, samples_per_prompt=1)
            outputs = answerer.answer(self.examples, single, **options)
            bar.advance(steps=len(self.examples))
            if recipe.sampling is None:
                return outputs, None
            return outputs, answerer.answer(self.examples, recipe.sampling, **options)

    def _per_sample(
        self, row: dict[str, Any], name: str, metric: str, values: list[float], k: int
    ) -> None:
        """Means over each prompt's samples: prompts, not samples, are independent."""
        per_prompt = np.asarray(values).reshape(-1, k).mean(axis=1).tolist()
        self.per_prompt.setdefault(metric, {})[name] = per_prompt
        row[f"{metric}_mean"], row[f"{metric}_ci95"] = mean_ci95(per_prompt)

    def _corpus_scores(self, outputs: Outputs) -> dict[str, Any]:
        if not self.has_references:
            return {}
        bleu = corpus_bleu(outputs.responses, self.references)
        chrf = corpus_chrf(outputs.responses, self.references)
        pairs = zip(outputs.responses, self.references, strict=True)
        return {
            "bleu": bleu.score,
            "bleu_signature": bleu.signature,
            "chrf": chrf.score,
            "chrf_signature": chrf.signature,
            "exact_match": float(
                np.mean([answer.strip() in [r.strip() for r in refs] for answer, refs in pairs])
            ),
        }

    def _scored(self, source: RewardSource, responses: Sequence[str], k: int) -> list[float]:
        repeated = [e for e in self.examples for _ in range(k)]
        prompts, references = [e.prompt for e in repeated], [e.references for e in repeated]
        return list(source(prompts, responses, references))

    def _copied(self) -> list[str] | None:
        sources = [e.source_text for e in self.examples if e.source_text is not None]
        complete = self.has_references and len(sources) == len(self.examples)
        return sources if complete else None

    def _reward(self) -> RewardSource | None:
        recipe = self.recipe
        if not recipe.reward:
            return None
        return build_reward(
            recipe.reward,
            load_model=reward_model_loader(
                self.device,
                precision=recipe.precision,
                trust_remote_code=recipe.trust_remote_code,
                tokens_per_microbatch=recipe.tokens_per_microbatch,
            ),
        )

    def _answerer(self, model: str) -> Answerer:
        return Answerer(
            model,
            device=self.device,
            precision=self.recipe.precision,
            trust_remote_code=self.recipe.trust_remote_code,
            tokens_per_microbatch=self.recipe.tokens_per_microbatch,
        )


def _prompts(recipe: EvalRecipe, session: Run) -> tuple[PromptExample, ...]:
    data = recipe.data
    sources = data.test or data.train
    if not sources:
        raise AlignError("data: no prompts given; name a file, a folder or a hub data set")
    named = with_columns(sources, data.columns)
    loaded = load_examples(named, kind="prompt", on_bad_row=data.on_bad_row, seed=recipe.seed)
    session.describe_data(prompts=loaded.reports)
    examples = [e for e in loaded.examples if isinstance(e, PromptExample)]
    return pick(examples, data.max_test_rows, recipe.seed)


SHOWN = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "reward_mean": "reward",
    "sample_chrf_mean": "chrF of samples",
    "sample_reward_mean": "reward of samples",
    "kl": "KL, nats",
    "length_mean": "tokens",
    "eos_rate": "ended",
}


def _table(results: dict[str, Any]) -> list[list[str]]:
    rows = list(results["models"])
    if results["copy_baseline"] is not None:
        rows = [{"name": COPY, **results["copy_baseline"]}, *rows]
    keys = [key for key in SHOWN if any(row.get(key) is not None for row in rows)]
    heading = ["model", *(SHOWN[key] for key in keys)]
    return [heading, *([row["name"], *(_cell(row.get(key)) for key in keys)] for row in rows)]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _significance(comparisons: Sequence[dict[str, Any]], models: Sequence[str]) -> str:
    rows = [["difference", "metric", "by", "95% interval", "p"]]
    for c in comparisons:
        low, high = c["ci95"]
        rows.append(
            [
                f"{c['a']} - {c['b']}",
                c["metric"],
                f"{c['difference']:+.3f}",
                f"{low:+.3f} .. {high:+.3f}",
                f"{c['p']:.3f}",
            ]
        )
    return table(rows, title="paired differences") if len(rows) > 1 else "nothing to compare"
