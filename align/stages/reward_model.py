"""Bradley–Terry reward model: -log sigmoid(score(chosen) - score(rejected) - margin), per pair.

Chosen and rejected share one copy of their prompt. The score is read at each response's last token,
its end token, as plain transformers reads it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.base.files import write_whole
from align.base.progress import change, say
from align.config.keys import RewardModelConfig, RewardRecipe
from align.data.batches import Batches
from align.data.tokens.decode import decode_response
from align.data.tokens.lengths import longer_wins
from align.data.tokens.packing import pack, windows
from align.losses import bradley_terry_loss
from align.models import ScalarModel, load_scalar_model
from align.models.attention.choose import settle_backend
from align.models.load import weights_hash
from align.models.policy import batch_sequences
from align.models.pooling import add_pooling_layer
from align.models.router import router_loss
from align.stages.common import (
    Session,
    describe_model,
    open_session,
)
from align.stages.data import load_data
from align.stages.router import add_router_loss, use_router_loss
from align.training.distributed import gather_full_model, prepare
from align.training.loop import train
from align.training.objective import Objective, StepOutput
from align.types import AlignError, TokenBatch, TokenGroup, TokenSequence

REFERENCE_PAIRS = 100
"""Training pairs that set the gain: the std of their 200 scores is known to about 5%."""


def run(recipe: RewardRecipe) -> None:
    """Train a one-label model on preference pairs and save it in ``output_dir/model``."""
    session = open_session(recipe, "rm")
    train_data, test_data = load_data(
        session, recipe.data, "preference", seed=recipe.seed, train=recipe.train
    )
    scalar = _load(recipe, session)
    aux_coef = recipe.train.router_aux_coef
    model = prepare(scalar, session.accelerator)
    options = recipe.reward_model

    def loss_fn(batch: TokenBatch, groups: Sequence[TokenGroup]) -> StepOutput:
        output = _loss(model, batch, groups, options)
        pairs = len(batch.sequences) / 2
        return add_router_loss(output, router_loss(scalar, batch), coef=aux_coef, units=pairs)

    batches, test_groups = train_data.batches(recipe.train.minibatch), test_data.groups
    if options.use_margin and all(group.margin is None for group in batches.at_hand()):
        raise AlignError(
            "reward_model.use_margin: no training pair has a margin; name its column in "
            "data.columns.margin, or leave use_margin out"
        )

    before, after = train(model, (batches, test_groups), Objective(loss_fn), session, recipe)
    trained = gather_full_model(model, session.accelerator)
    facts = {}
    if trained is not None:
        facts = _finish(session, trained, batches, test_groups, recipe)
    baseline = _accuracy_of_longer(test_groups, session)
    after, before = after | baseline, before | baseline
    session.run.finish(change(before, after), held_out=after, **facts)


def _load(recipe: RewardRecipe, session: Session) -> ScalarModel:
    """Load the one-label model, with its options, and describe it in the manifest."""
    scalar = load_scalar_model(
        recipe.model,
        device=session.accelerator.device,
        lora=recipe.lora,
        gradient_checkpointing=recipe.gradient_checkpointing,
        **recipe.loading,
    )
    scalar.activation_offload = recipe.activation_offload
    if recipe.reward_model.pooling_layer:
        _add_pooling_layer(scalar, recipe)
    use_router_loss(scalar, recipe.train.router_aux_coef, session)
    session.run.describe(
        start_weights=weights_hash(scalar.inner), **describe_model(scalar, session)
    )
    return scalar


def _add_pooling_layer(scalar: ScalarModel, recipe: RewardRecipe) -> None:
    if not scalar.fresh_head:
        raise AlignError(
            f"reward_model.pooling_layer: {scalar.name} is a reward model already, whose head was "
            "trained without the new layer; leave it out, or start from a language model"
        )
    add_pooling_layer(scalar.inner, name=scalar.name)
    settle_backend(scalar, recipe.attention)  # try the longer model like a loaded one


def _loss(
    model: torch.nn.Module,
    batch: TokenBatch,
    groups: Sequence[TokenGroup],
    options: RewardModelConfig,
) -> StepOutput:
    """Compute the loss and the metrics of a microbatch of pairs."""
    chosen, rejected, pairs = pair_scores(model(batch, at="last"), batch)
    margin = _margins([groups[i] for i in pairs]) if options.use_margin else None
    losses = bradley_terry_loss(
        chosen,
        rejected,
        margin=None if margin is None else margin.to(chosen.device),
        center_coef=options.center_coef,
    )
    count, gap = float(len(pairs)), chosen - rejected
    sums = {
        "loss": (losses.sum().item(), count),
        # a tie counts half, as in `align eval`
        "accuracy": (((gap > 0).sum() + 0.5 * (gap == 0).sum()).item(), count),
        "margin": (gap.sum().item(), count),
        "score_mean": ((chosen + rejected).sum().item(), 2 * count),
    }
    return StepOutput(losses.sum(), sums)


def pair_scores(scores: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, list[int]]:
    """Split scores in the batch's order into chosen ``[n]``, rejected ``[n]`` and pair numbers.

    Sequences are numbered chosen, rejected, chosen, ...; packing never splits a pair.
    """
    numbers = batch_sequences(batch)
    return scores[numbers % 2 == 0], scores[numbers % 2 == 1], (numbers[::2] // 2).tolist()


def _margins(groups: Sequence[TokenGroup]) -> Tensor:
    return torch.tensor([group.margin or 0.0 for group in groups])


def _accuracy_of_longer(groups: Sequence[TokenGroup], session: Session) -> dict[str, float]:
    """Compute the accuracy of preferring the longer answer, in characters of the decoded tokens."""
    if not groups:
        return {}

    def num_characters(answer: TokenSequence) -> int:
        return len(decode_response(session.tokenizer, answer.input_ids))

    lengths = [[num_characters(answer) for answer in group.continuations] for group in groups]
    return {"accuracy_of_longer": longer_wins([chosen - rejected for chosen, rejected in lengths])}


def _finish(
    session: Session,
    scalar: ScalarModel,
    batches: Batches,
    test_groups: Sequence[TokenGroup],
    recipe: RewardRecipe,
) -> dict[str, Any]:
    """Normalise the head, save the model, and write statistics of its scores.

    Returns:
        Interval of the held-out accuracy for the manifest; empty without held-out pairs.
    """
    facts: dict[str, Any] = {}
    scalar.to(session.accelerator.device)
    budget = recipe.train.tokens_per_microbatch
    reference = scores_of(scalar, batches.sample(REFERENCE_PAIRS, recipe.seed), budget)
    gain = 1.0
    if recipe.reward_model.normalize and reference.std() > 0:
        gain = 1.0 / float(reference.std())
        scalar.scale_head(gain)
    stats: dict[str, Any] = {
        "gain": gain,
        # statistics of the saved model's scores on those pairs; PPO subtracts the mean
        "mean": float(reference.mean() * gain),
        "std": float(reference.std() * gain),
        "scores": int(reference.size),
    }
    if test_groups:
        held_out = scores_of(scalar, test_groups, budget)
        gaps = held_out[0::2] - held_out[1::2]
        from align.evaluation.agreement import accuracy  # imports sacrebleu and scipy

        low, high = accuracy(gaps)["accuracy_ci95"]
        facts["held_out_accuracy_ci95"] = [low, high]
        stats |= facts
        say(f"  held-out accuracy: 95% interval {low:.3f} to {high:.3f}, {len(gaps)} pairs")
        counts, edges = np.histogram(gaps, bins=20)
        stats["held_out_margins"] = {"counts": counts.tolist(), "edges": edges.tolist()}
        _plot_margins(gaps, session)
    scalar.save(
        session.run.folder / "model",
        session.tokenizer,
        extra_files={"reward_stats.json": json.dumps(stats, indent=2) + "\n"},
    )
    return facts


@torch.no_grad()
def scores_of(scalar: ScalarModel, groups: Sequence[TokenGroup], budget: int) -> np.ndarray:
    """Compute scores ``[2 * pairs]``, chosen and rejected in turn, float64."""
    scalar.eval()
    parts = [np.zeros(0)]
    for part in windows(groups):
        scores = np.zeros(2 * len(part))
        for batch in pack(part, tokens_per_microbatch=budget):
            found = scalar(batch.to(scalar.device), at="last")
            scores[batch_sequences(batch)] = found.double().cpu().numpy()
        parts.append(scores)
    return np.concatenate(parts)


def _plot_margins(gaps: np.ndarray, session: Session) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist(gaps, bins=20, color="#4c72b0")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("score(chosen) - score(rejected), standard deviations of the score")
    axes.set_ylabel("held-out pairs")
    axes.set_title(f"{(gaps > 0).mean():.0%} of {len(gaps)} held-out pairs in the right order")
    path = session.run.folder / "margins.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_whole(path, drawn.getvalue())
    plt.close(figure)
    say(f"  margin histogram: {path}")
