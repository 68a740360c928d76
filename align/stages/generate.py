"""Sample responses to prompts, score them, and turn the scores into preference pairs.

Writes ``samples.jsonl`` (prompt, response, references, score) and, with ``pairs``, ``pairs.jsonl``
(prompt, chosen, rejected, margin) for ``align rm`` and ``align dpo``; with ``best_of_n`` also
``best.jsonl``, for ``align sft``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from align.base.progress import Progress, say
from align.config.keys import GenerateRecipe, PairsConfig
from align.feedback.pairs import choose_pairs
from align.models import load_policy
from align.rewards import (
    build_reward,
    check_functions,
    columns_of,
    score_responses,
    warn_of_constant,
)
from align.rewards.model import reward_model_loader
from align.rollout.engine import require_engine, sample
from align.rollout.experience import decode_rollout
from align.stages.common import (
    Session,
    open_session,
    policy_end_ids,
    require_same_vocabulary,
)
from align.stages.data import Split, load_data
from align.training.distributed import gather_in_order, my_share
from align.types import AlignError, PromptExample

FEW = "fewer than two finished samples"
UNFINISHED = "ended by itself with a text; raise generation.max_new_tokens"
Answer: TypeAlias = tuple[str, bool]
"""A sampled text, and True if it ended by itself."""


def run(recipe: GenerateRecipe) -> None:
    """Sample from ``recipe.model`` on the prompts of ``data.train``."""
    if recipe.pairs is not None and not recipe.reward:
        raise AlignError("pairs: samples are ranked by a reward; set `reward`, for instance chrf")
    if recipe.data.test:
        raise AlignError("data.test: generate samples from every prompt; put them in data.train")
    require_engine(recipe.generation)
    check_functions("reward", recipe.reward)
    session = open_session(recipe, "generate")
    every_prompt = replace(recipe.data, test_fraction=0.0)
    prompts, _ = load_data(session, every_prompt, "prompt", seed=recipe.seed)
    columns = columns_of(prompts.examples)
    check_functions("reward", recipe.reward, columns, quiet=not session.run.is_main)
    accelerator = session.accelerator
    names = (recipe.model, *recipe.also)
    for other in recipe.also:
        require_same_vocabulary("also", other, recipe, session)
    by_model = [_sample(recipe, name, session, prompts) for name in names]
    # all samples of a prompt are neighbours, of any model
    answers = [[a for one in same for a in one] for same in zip(*by_model, strict=True)]
    k = recipe.generation.samples_per_prompt
    writers = [name for name in names for _ in range(k)]
    if not accelerator.is_main_process:
        return
    rows = _score(recipe, prompts.examples, answers, writers, accelerator)
    session.run.begin()
    session.run.write_rows("samples.jsonl", rows)
    report = [["sampled", ""], ["responses", str(len(rows))]]
    report.append(["ended by themselves", f"{np.mean([r['finished'] for r in rows]):.1%}"])
    if recipe.reward:
        report.append(["mean score", f"{np.mean([r['score'] for r in rows]):.4g}"])
    if recipe.pairs is not None:
        pairs, left_out = make_pairs(rows, len(writers), recipe.pairs)
        if not pairs:
            raise AlignError(f"no pairs can be made of {len(rows)} samples: {_why(left_out)}")
        session.run.write_rows("pairs.jsonl", pairs)
        session.run.describe(pairs=len(pairs), left_out=left_out)
        report.append(["pairs", str(len(pairs))])
        for reason, count in left_out.items():
            say(f"  left out {count} pairs: {reason}")
    if recipe.best_of_n:
        best = best_of_n(rows, len(writers))
        if not best:
            raise AlignError(f"best_of_n: none of {len(rows)} samples {UNFINISHED}")
        session.run.write_rows("best.jsonl", best)
        report.append([f"best of {len(writers)}", str(len(best))])
    session.run.finish(report)


def _sample(
    recipe: GenerateRecipe, model: str, session: Session, prompts: Split
) -> list[list[Answer]]:
    """Sample every prompt from one model, in the prompts' order, on every rank."""
    accelerator = session.accelerator
    policy = load_policy(
        model,
        device=accelerator.device,
        **recipe.loading,
    )
    k, end_ids = recipe.generation.samples_per_prompt, policy_end_ids(policy, session)
    mine = my_share(prompts.groups, accelerator)
    with Progress(
        len(mine) * k, "generate", unit="response", shown=accelerator.is_main_process
    ) as bar:
        rollout = sample(
            policy,
            [g.prefix_ids for g in mine],
            recipe.generation,
            end_ids=end_ids,
            seed=recipe.seed,
            numbers=my_share(list(range(len(prompts.groups))), accelerator),
            prefill_tokens=recipe.tokens_per_microbatch,
            on_tokens=lambda n: bar.advance(steps=0, tokens=n),
        )
    asked = my_share([example.prompt for example in prompts.examples], accelerator)
    texts = decode_rollout(session.tokenizer, rollout, asked, end_ids=end_ids)
    answers = list(zip(texts, rollout.finished.tolist(), strict=True))
    return gather_in_order([answers[i * k : (i + 1) * k] for i in range(len(mine))], accelerator)


def _score(
    recipe: GenerateRecipe,
    examples: Sequence[PromptExample],
    answers: Sequence[Sequence[Answer]],
    writers: Sequence[str],
    accelerator: Any,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "id": example.id,
            "prompt": example.prompt,
            "response": text,
            "references": list(example.references),
            "finished": ended,
            **({"model": writer} if recipe.also else {}),
        }
        for example, same in zip(examples, answers, strict=True)
        for (text, ended), writer in zip(same, writers, strict=True)
    ]
    if recipe.reward:
        reward = build_reward(
            recipe.reward,
            load_model=reward_model_loader(
                accelerator.device,
                tokens_per_microbatch=recipe.tokens_per_microbatch,
                **recipe.loading,
            ),
        )
        repeated = [e for e, same in zip(examples, answers, strict=True) for _ in same]
        scores = score_responses(reward, repeated, [row["response"] for row in rows])
        warn_of_constant(reward, scores)
        for row, score in zip(rows, scores, strict=True):
            row["score"] = score
    return rows


def _why(left_out: dict[str, int]) -> str:
    """List reasons with their counts, and the remedy for a short token limit."""
    says = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
    return f"{says}; raise generation.max_new_tokens" if FEW in left_out else says


def best_of_n(rows: Sequence[dict[str, Any]], samples_per_prompt: int) -> list[dict[str, Any]]:
    """Choose each prompt's best finished sample, for `align sft` (rejection sampling).

    A prompt whose samples were all cut off or empty is skipped.
    """
    best = []
    for start in range(0, len(rows), samples_per_prompt):
        samples = rows[start : start + samples_per_prompt]
        usable = [r for r in samples if r["finished"] and r["response"].strip()]
        if usable:
            row = max(usable, key=lambda r: r["score"])
            kept = {name: row[name] for name in ("id", "prompt", "score")}
            best.append({**kept, "completion": row["response"]})
    return best


def make_pairs(
    rows: Sequence[dict[str, Any]], samples_per_prompt: int, options: PairsConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Make preference pairs of each prompt's scored samples; count the skipped ones by reason.

    Unfinished and empty samples are never used: a cut-off text teaches the wrong thing.
    """
    pairs: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for start in range(0, len(rows), samples_per_prompt):
        samples = rows[start : start + samples_per_prompt]
        usable = [r for r in samples if r["finished"] and r["response"].strip()]
        if len(usable) < 2:
            left_out.update([FEW])
            continue
        chosen_rejected, reasons = choose_pairs(
            [row["response"] for row in usable],
            [row["score"] for row in usable],
            choose=options.choose,
            min_margin=options.min_margin,
            threshold=options.threshold,
        )
        left_out.update(reasons)
        for i, j in chosen_rejected:
            chosen, rejected = usable[i], usable[j]
            pairs.append(
                {
                    "id": chosen["id"],
                    "prompt": chosen["prompt"],
                    "chosen": chosen["response"],
                    "rejected": rejected["response"],
                    "margin": chosen["score"] - rejected["score"],
                }
            )
    return pairs, dict(left_out)
