"""``align eval``: one table over one or several checkpoints, on held-out prompts.

BLEU, chrF and reward are measured on ``generation`` (greedy by default); KL to the reference and
the mean of per-sample scores on ``sampling``, if the recipe has it. Every pair of models is
compared prompt by prompt. Copying the input is measured too if the task has a source text, and the
reward itself if there are ``preferences``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from align.base.files import write_whole
from align.base.progress import Progress, say
from align.config.keys import EvalRecipe
from align.config.load import to_yaml
from align.config.sections import RewardTerm
from align.data.examples import load_examples, split_by_prompt, with_columns
from align.data.held_out import notes_of
from align.data.subset import pick
from align.evaluation.agreement import best_of_n, best_of_n_kl
from align.evaluation.measure import Evaluator, System, own_metric
from align.evaluation.metrics import CORPUS_METRICS, require_metric
from align.evaluation.outputs import Generator, Outputs, Reference, ReferenceFit, read_outputs
from align.evaluation.reward import agreement_with, evaluate_reward
from align.evaluation.systems import Judge, comparisons, judge_of, pooled, win_rates
from align.evaluation.table import closing_table, reward_table, significance
from align.models.checks import check_models
from align.rewards import (
    FunctionReward,
    build_reward,
    check_functions,
    columns_of,
    load_function,
    needs_references,
    require_arguments,
)
from align.rewards.model import reward_model_loader
from align.rollout.engine import require_engine
from align.run.folder import Run
from align.types import AlignError, PreferencePair, PromptExample, RewardSource

COPY = "copy the input"


def run(recipe: EvalRecipe) -> None:
    """Evaluate ``recipe.models`` and write ``eval.json`` and ``outputs/<name>.jsonl``."""
    models = recipe.models or ({Path(recipe.model).name: recipe.model} if recipe.model else {})
    for name in models:
        if Path(name).name != name:
            raise AlignError(f"models: {name!r} names a file in outputs/; give it a plain name")
    for options in (recipe.generation, recipe.sampling):
        if options is not None:
            require_engine(options)
    check_plugins(recipe)
    check_models("eval", recipe)
    state = PartialState()
    if state.num_processes > 1:
        raise AlignError("eval: runs in one process; start it without `accelerate launch`")
    session = Run(
        "eval",
        recipe.output_dir,
        config_yaml=to_yaml(recipe),
        seed=recipe.seed,
        overwrite=recipe.overwrite,
        resumable=False,
    )
    prompts, pairs = _data(recipe, session, needs_prompts=bool(models))
    if prompts:  # the data's columns are known now
        columns = columns_of(prompts)
        check_functions("reward", recipe.reward, columns)
        check_functions("gold_reward", recipe.gold_reward, columns)
    say(f"eval: {len(models)} models on {len(prompts)} prompts -> {recipe.output_dir}")
    evaluation = _Evaluation(recipe, prompts, state.device)
    for name, model in models.items():
        evaluation.add(name, model)
    if recipe.best_of_n is not None:
        if recipe.reward and recipe.reference_model and recipe.sampling and models:
            evaluation.add_best_of_n(recipe.best_of_n)
        else:
            say("  best_of_n: left out; it needs reward, reference_model, sampling and models")
    results = evaluation.results()
    if pairs and evaluation.reward is not None:
        if evaluation.gold is not None and needs_references(evaluation.gold):
            say("  preferences: not compared with gold, which needs references and they have none")
        results["reward_model"] = evaluate_reward(
            evaluation.reward, pairs, gold=evaluation.gold, seed=recipe.seed
        )
    session.begin()
    for name, rows in evaluation.outputs_rows().items():
        (session.folder / "outputs").mkdir(exist_ok=True)
        session.write_rows(f"outputs/{name}.jsonl", rows)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_whole(session.folder / "eval.json", text)
    say("")
    if models:
        say(significance(results))
    if results["reward_model"] is not None:
        say(reward_table(results["reward_model"]))
    session.finish(closing_table(results), prompts=len(prompts))


def _judge(name: str | None) -> FunctionReward | None:
    """Load the judge function, and refuse it before anything is sampled if it cannot be called."""
    if name is None:
        return None
    named = replace(load_function(name, key="judge"), kind="judge")
    return require_arguments("judge", named, ("prompts", "a", "b", "references"))


def check_plugins(recipe: EvalRecipe) -> None:
    """Refuse functions that cannot be called, before any model is loaded for them."""
    check_functions("reward", recipe.reward)
    check_functions("gold_reward", recipe.gold_reward)
    _judge(recipe.judge)
    for name in recipe.metrics:
        require_metric(name)
        if name not in CORPUS_METRICS:
            own_metric(name)


class _Evaluation:
    """Results of the models added so far."""

    def __init__(
        self, recipe: EvalRecipe, examples: Sequence[PromptExample], device: torch.device
    ) -> None:
        self.recipe, self.examples, self.device = recipe, examples, device
        self.reward, self.gold = self._source(recipe.reward), self._source(recipe.gold_reward)
        self.evaluator = Evaluator(recipe, examples, reward=self.reward, gold=self.gold)
        self.judge = _judge(recipe.judge)
        self.systems: list[System] = []
        self.copied = self._copied()
        self.reference: Reference | None = None
        self.best_of_n: list[dict[str, Any]] | None = None
        # agreement of gold reward and reward over all samples of best-of-n
        self.agreement: dict[str, Any] | None = None
        if recipe.reference_model is not None and examples:
            self.reference = Reference(self._generator(recipe.reference_model))

    def add(self, name: str, model: str) -> None:
        if model.endswith(".jsonl"):
            outputs, samples, fit = read_outputs(model, self.examples), None, None
        else:
            outputs, samples, fit = self._generate(name, self._generator(model))
        system = self.evaluator.measure(name, outputs, samples, fit)
        system.row["model"] = model
        self.systems.append(system)

    def add_best_of_n(self, n: int) -> None:
        """Add the best by ``reward`` of n samples of the reference, as if it were a model."""
        recipe, reference = self.recipe, self.reference
        if reference is None or self.reward is None or recipe.sampling is None:
            raise AlignError("best_of_n: needs reference_model, reward and sampling")
        options = replace(recipe.sampling, samples_per_prompt=n)
        drawn = reference.generator.generate(self.examples, options, seed=recipe.seed + 1)
        shape = (len(self.examples), n)
        proxy = np.array(self.evaluator.score(self.reward, drawn.responses, n)).reshape(shape)
        gold = proxy
        if self.gold is not None:
            gold = np.array(self.evaluator.score(self.gold, drawn.responses, n)).reshape(shape)
            self.agreement = agreement_with(proxy, gold)
        best = proxy.argmax(axis=1) + np.arange(shape[0]) * n

        def of_best(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in best]

        chosen = Outputs(
            [drawn.responses[i] for i in best], of_best(drawn.lengths), of_best(drawn.finished)
        )
        system = self.evaluator.measure(f"best-of-{n}", chosen)
        # an upper bound, since best-of-n is not a model
        system.row["kl"] = best_of_n_kl(n)
        system.row["model"] = f"best of {n} samples of {recipe.reference_model}"
        self.systems.append(system)
        curve = zip(best_of_n(proxy, proxy), best_of_n(proxy, gold), strict=True)
        self.best_of_n = [
            {"n": i, "kl": best_of_n_kl(i), "reward": r, "gold": g if self.gold else None}
            for i, (r, g) in enumerate(curve, start=1)
        ]

    def results(self) -> dict[str, Any]:
        recipe = self.recipe
        systems = ([self.copied] if self.copied else []) + self.systems
        judges: dict[str, Judge | str] = {}
        if self.reward is not None:
            judges[self.reward.name] = "reward"
        if self.gold is not None:
            judges[self.gold.name] = "gold"
        if self.judge is not None:
            judges[self.judge.name] = judge_of(self.judge, self.examples)
        return {
            "models": [s.row for s in self.systems],
            "pooled": pooled(self.systems),
            "comparisons": comparisons(systems, recipe.num_resamples),
            "win_rates": win_rates(
                self.systems,
                judges,
                tie_margin=recipe.tie_margin,
                resamples=recipe.num_resamples,
            ),
            "copy_baseline": self._copy_baseline(),
            "best_of_n": self.best_of_n,
            "gold_agreement": self.agreement,
            "reward_model": None,
        }

    def outputs_rows(self) -> dict[str, list[dict[str, Any]]]:
        return {
            system.name: [
                {
                    "id": example.id,
                    "prompt": example.prompt,
                    "response": system.outputs.responses[i],
                    "references": list(example.references),
                    "reward": system.values["reward"][i] if "reward" in system.values else None,
                    "gold": system.values["gold"][i] if "gold" in system.values else None,
                    "finished": system.outputs.finished[i] if system.outputs.finished else None,
                }
                for i, example in enumerate(self.examples)
            ]
            for system in self.systems
        }

    def _generate(
        self, name: str, generator: Generator
    ) -> tuple[Outputs, Outputs | None, ReferenceFit | None]:
        recipe = self.recipe
        total = len(self.examples) * (1 if recipe.sampling is None else 2)
        with Progress(total, f"eval {name}", unit="prompt") as bar:

            def count(tokens: int) -> None:
                bar.advance(steps=0, tokens=tokens)

            options: dict[str, Any] = {
                "seed": recipe.seed,
                "reference": self.reference,
                "on_tokens": count,
            }
            fit = generator.fit(self.examples) if self.evaluator.has_references else None
            single = replace(recipe.generation, samples_per_prompt=1)
            outputs = generator.generate(self.examples, single, **options)
            bar.advance(steps=len(self.examples))
            if recipe.sampling is None:
                return outputs, None, fit
            return outputs, generator.generate(self.examples, recipe.sampling, **options), fit

    def _copied(self) -> System | None:
        sources = [e.source_text for e in self.examples if e.source_text is not None]
        complete = self.evaluator.has_references and len(sources) == len(self.examples)
        if not complete or not sources:
            return None
        # without reward, since no model wrote it
        system = System(COPY, {}, Outputs(sources))
        self.evaluator.against_references(system)
        return system

    def _copy_baseline(self) -> dict[str, Any] | None:
        return None if self.copied is None else self.copied.row

    def _source(self, terms: Sequence[RewardTerm]) -> RewardSource | None:
        if not terms:
            return None
        return build_reward(
            terms,
            load_model=reward_model_loader(
                self.device,
                tokens_per_microbatch=self.recipe.tokens_per_microbatch,
                **self.recipe.loading,
            ),
        )

    def _generator(self, model: str) -> Generator:
        return Generator(model, self.recipe, device=self.device)


def _data(
    recipe: EvalRecipe, session: Run, *, needs_prompts: bool
) -> tuple[tuple[PromptExample, ...], tuple[PreferencePair, ...]]:
    """Load prompts to answer and pairs to judge the reward on; at least one of them."""
    data = recipe.data
    sources = data.test or data.train
    if needs_prompts and not sources:
        raise AlignError("data: no prompts given; name a file, a folder or a hub data set")
    options: dict[str, Any] = {"on_bad_row": data.on_bad_row, "seed": recipe.seed}
    if sources and not needs_prompts:
        say("  data: left out; there is no model to answer its prompts")
    prompts: list[PromptExample] = []
    pairs: list[PreferencePair] = []
    reports: dict[str, Any] = {}
    for note in notes_of((*sources, *recipe.preferences.train, *recipe.preferences.test)):
        say(f"eval: {note}")
    if needs_prompts:
        loaded = load_examples(with_columns(sources, data.columns), kind="prompt", **options)
        prompts = [e for e in loaded.examples if isinstance(e, PromptExample)]
        reports["prompts"] = loaded.reports
    judged = recipe.preferences
    if (judged.train or judged.test) and not recipe.reward:
        say("  preferences: left out; there is no reward to judge")
    elif judged.train or judged.test:
        options["on_bad_row"] = judged.on_bad_row
        named = with_columns(judged.test or judged.train, judged.columns)
        loaded = load_examples(named, kind="preference", **options)
        pairs = [e for e in loaded.examples if isinstance(e, PreferencePair)]
        if not judged.test:
            fraction = judged.test_fraction
            pairs = list(split_by_prompt(pairs, test_fraction=fraction, seed=recipe.seed)[1])
        pairs = list(pick(pairs, judged.max_test_rows, recipe.seed))
        reports["preferences"] = loaded.reports
        if not pairs:
            raise AlignError("preferences: no pair is held out; set preferences.test")
    session.describe_data(**reports)
    return tuple(pick(prompts, data.max_test_rows, recipe.seed)), tuple(pairs)
