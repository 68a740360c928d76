"""Measure one model's outputs: its row of ``eval.json``, and per-prompt numbers for comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from align.base.intervals import (
    mean_ci95,
    percentiles,
    proportion_ci95,
    share_ci95,
)
from align.base.progress import say
from align.config.keys import EvalRecipe
from align.evaluation.bleu import corpus_ci95, corpus_score, corpus_statistics
from align.evaluation.metrics import CORPUS_METRICS, METRICS
from align.evaluation.outputs import Outputs, ReferenceFit, mean
from align.evaluation.scripts import tokenizer_hint
from align.evaluation.text import distinct_n, distinct_n_ci95, exact_matches
from align.rewards import load_function, require_arguments, score_responses
from align.rewards.guard import guarded
from align.rewards.metric import MetricReward
from align.types import AlignError, PromptExample, RewardSource


@dataclass
class System:
    """A measured model.

    Attributes:
        row: Its entry under ``models`` in eval.json.
        outputs: Its answers under ``generation``.
        values: Metric -> one number for each prompt, in the prompts' order.
        statistics: Corpus metric -> counts ``[prompts, n]``.
    """

    name: str
    row: dict[str, Any]
    outputs: Outputs
    values: dict[str, list[float]] = field(default_factory=dict)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)


class Evaluator:
    """Metrics, rewards and references with which every model is measured."""

    def __init__(
        self,
        recipe: EvalRecipe,
        examples: Sequence[PromptExample],
        *,
        reward: RewardSource | None,
        gold: RewardSource | None,
    ) -> None:
        self.recipe, self.examples = recipe, examples
        self.references = [e.references for e in examples]
        self.has_references = all(self.references)
        if any(self.references) and not self.has_references:
            bare = [e.id for e in examples if not e.references]
            raise AlignError(
                f"data: {len(bare)} of {len(examples)} rows have no references, the first is "
                f"{bare[0]}; BLEU needs them in every row: add them or leave these rows out"
            )
        self.sources = {"reward": reward, "gold": gold}
        self.own = {n: own_metric(n) for n in recipe.metrics if n not in CORPUS_METRICS}
        self._check_corpus_metrics([n for n in recipe.metrics if n in CORPUS_METRICS])

    def _check_corpus_metrics(self, names: Sequence[str]) -> None:
        """Report missing references, and a tokenizer that does not fit, before anything is
        sampled.
        """
        if not self.examples:
            return
        if not self.has_references:
            if names and self.recipe.metrics != EvalRecipe.metrics:
                say(f"  metrics: {', '.join(names)} left out: the data have no references")
            return
        for name in names:
            CORPUS_METRICS[name]()
        hint = tokenizer_hint(names, self.references)
        if hint:
            say(f"  {hint}")

    def measure(
        self,
        name: str,
        outputs: Outputs,
        samples: Outputs | None = None,
        fit: ReferenceFit | None = None,
    ) -> System:
        """Measure the answers, the samples if any, and the fit to the references."""
        system = System(name, {"name": name}, outputs)
        self.against_references(system)
        for key, source in self.sources.items():
            if source is not None:
                self._values(system, key, self.score(source, outputs.responses), f"{key}_mean")
        for metric, compute in self.own.items():
            self._own(system, metric, compute)
        self._texts(system)
        if fit is not None:
            system.row |= _perplexity(fit, self.recipe.num_resamples)
        self._divergence(system, samples or outputs)
        if samples is not None and self.recipe.sampling is not None:
            self._samples(system, samples, self.recipe.sampling.samples_per_prompt)
        return system

    def score(self, source: RewardSource, responses: Sequence[str], k: int = 1) -> list[float]:
        repeated = [e for e in self.examples for _ in range(k)]
        return list(score_responses(source, repeated, responses))

    def against_references(self, system: System) -> None:
        """Compute corpus metrics and exact matches."""
        if not self.has_references:
            return
        responses, row = system.outputs.responses, system.row
        for metric in (m for m in self.recipe.metrics if m in CORPUS_METRICS):
            result = corpus_score(metric, responses, self.references)
            statistics = corpus_statistics(CORPUS_METRICS[metric](), responses, self.references)
            row[metric], row[f"{metric}_signature"] = result.score, result.signature
            row[f"{metric}_ci95"] = corpus_ci95(
                statistics, metric, num_resamples=self.recipe.num_resamples
            )
            system.statistics[metric] = statistics
        matches = exact_matches(responses, self.references)
        row["exact_match"] = float(np.mean(matches))
        row["exact_match_ci95"] = proportion_ci95(row["exact_match"], len(matches))

    def _own(self, system: System, metric: str, compute: OwnMetric) -> None:
        found = compute(
            [e.prompt for e in self.examples], system.outputs.responses, self.references
        )
        if isinstance(found, dict):
            taken = found.keys() & system.row.keys()
            if taken:
                raise AlignError(f"metrics: {metric}: {min(taken)} is a name of ours; rename it")
            # convert NumPy's numbers and arrays for JSON
            found = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in found.items()}
            for key, value in found.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise AlignError(f"metrics: {metric}: {key} is {value}, which JSON cannot hold")
            system.row |= found
        else:
            name = metric.partition(":")[2]
            self._values(system, name, found, f"{name}_mean")

    def _texts(self, system: System) -> None:
        """Measure length, the share that ended, distinct n-grams, and metrics of answers alone."""
        outputs, row = system.outputs, system.row
        row["length_mean"], row["length_ci95"] = mean(outputs.lengths), None
        if outputs.lengths is not None:
            self._values(system, "length", [float(n) for n in outputs.lengths], "length_mean")
        row["eos_rate"], row["eos_rate_ci95"] = mean(outputs.finished), None
        if outputs.finished is not None:
            row["eos_rate_ci95"] = proportion_ci95(row["eos_rate"], len(outputs.finished))
        for n in (1, 2):
            row[f"distinct_{n}"] = distinct_n(outputs.responses, n)
            row[f"distinct_{n}_ci95"] = distinct_n_ci95(outputs.responses, n)
        for key, metric in METRICS.items():
            if metric.answers is not None:
                values = metric.answers(outputs.responses)
                self._values(system, key, values, metric.figure)
                if metric.is_share:
                    # often 0 for every output, to which Student's t gives no width
                    row[f"{key}_ci95"] = share_ci95(values)

    def _divergence(self, system: System, drawn: Outputs) -> None:
        row = system.row
        row["kl"], row["kl_ci95"], row["kl_per_token"] = mean(drawn.kl), None, None
        if drawn.kl is not None and drawn.lengths is not None:
            per_prompt = _per_prompt(drawn.kl, len(self.examples))
            # the KL of a model to itself is 0 for any samples
            row["kl_ci95"] = mean_ci95(per_prompt, "kl")[1] if any(per_prompt) else (0.0, 0.0)
            row["kl_per_token"] = sum(drawn.kl) / sum(drawn.lengths)

    def _samples(self, system: System, samples: Outputs, k: int) -> None:
        """Average over each prompt's samples, since prompts, not samples, are independent."""
        row = system.row
        row["sample_length_mean"] = mean(samples.lengths)
        row["sample_eos_rate"] = mean(samples.finished)
        sources = {"chrf": MetricReward("chrf") if self.has_references else None, **self.sources}
        for key, source in sources.items():
            if source is not None:
                scores = _per_prompt(self.score(source, samples.responses, k), len(self.examples))
                self._values(system, f"sample_{key}", scores, f"sample_{key}_mean")

    def _values(self, system: System, metric: str, values: Sequence[float], key: str) -> None:
        system.values[metric] = list(values)
        system.row[key], system.row[f"{metric}_ci95"] = mean_ci95(values, metric)


OwnMetric = Callable[[Sequence[Any], Sequence[str], Sequence[Sequence[str]]], Any]


def own_metric(name: str) -> OwnMetric:
    """Load ``module:name``: a function like a reward's, or an ``evaluate`` metric (class or
    object).
    """
    import evaluate  # takes a second, and few recipes name a metric of their own

    named = replace(load_function(name, key="metrics"), kind="metric")
    module: Any = named.function
    if isinstance(module, type) and issubclass(module, evaluate.EvaluationModule):
        module = guarded(f"metric {name}", module)
    if not isinstance(module, evaluate.EvaluationModule):
        return require_arguments("metrics", named)

    def compute(
        prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = {"predictions": list(responses)}
        if "references" in module._feature_names():
            inputs["references"] = [list(row) for row in references]
        return dict(guarded(f"metric {name}", partial(module.compute, **inputs)))

    return compute


def _perplexity(fit: ReferenceFit, num_resamples: int) -> dict[str, Any]:
    """Compute perplexity of all reference tokens; its interval resamples prompts."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(fit.nll), size=(num_resamples, len(fit.nll)))
    per_token = fit.nll[rows].sum(1) / fit.tokens[rows].sum(1)
    ends = percentiles(per_token, len(fit.nll))
    return {
        "perplexity": float(np.exp(fit.nll.sum() / fit.tokens.sum())),
        "perplexity_ci95": ends and (float(np.exp(ends[0])), float(np.exp(ends[1]))),
        "bits_per_byte": float(fit.nll.sum() / np.log(2) / fit.num_bytes.sum()),
    }


def _per_prompt(values: Sequence[float], num_prompts: int) -> list[float]:
    return np.asarray(values, dtype=float).reshape(num_prompts, -1).mean(axis=1).tolist()
