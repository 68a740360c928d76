"""Direct preference optimisation: learn from pairs without a reward model.

    h = log pi(chosen)/pi_ref(chosen) - log pi(rejected)/pi_ref(rejected)
    loss = -log sigmoid(beta h), or another of the losses in ``align.losses.dpo``

The reference's log-probabilities are computed once and cached on disk by default, keyed by its
weights and the token ids; or computed with the adapter off, or by a second model, at every step.
Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from align.base.progress import change
from align.config.keys import DPOConfig, DPORecipe
from align.data.tokens.groups import TokenGroups
from align.data.tokens.packing import counted_coordinates
from align.losses.dpo import LOSSES, OPTIONS, dpo_loss, sft_term, wpo_weights
from align.losses.logprobs import TokenStatistics
from align.models import Policy, load_policy
from align.models.load import weights_hash
from align.models.lora import adapter_off
from align.models.policy import batch_sequences
from align.models.router import router_loss
from align.stages.common import (
    Session,
    describe_model,
    open_session,
    require_same_vocabulary,
    save_policy,
)
from align.stages.data import load_data
from align.stages.dpo_options import check_options
from align.stages.dpo_reference import ReferenceCache
from align.stages.router import add_router_loss, use_router_loss
from align.training.distributed import prepare, shard
from align.training.loop import train
from align.training.objective import LossFn, Objective, StepOutput
from align.types import TokenBatch, TokenGroup

Reference = Callable[[TokenBatch, Sequence[TokenGroup]], Tensor]
"""Function to the reference log-probs of a batch's sequences, in the batch's order."""


def run(recipe: DPORecipe) -> None:
    """Train ``recipe.model`` on preference pairs and save it in ``output_dir/model``."""
    check_options(recipe)
    session = open_session(recipe, "dpo")
    train_data, test_data = load_data(
        session, recipe.data, "preference", seed=recipe.seed, train=recipe.train
    )
    policy = _load(recipe, session)
    aux_coef = recipe.train.router_aux_coef
    train_groups, test_groups = train_data.groups, test_data.groups
    frozen = _frozen(recipe, session)
    models = [policy] if frozen is None else [policy, frozen]
    hashes = [weights_hash(model.inner) for model in models]
    session.run.describe(start_weights=hashes, **describe_model(policy, session))
    train_reference = _reference(recipe, session, policy, frozen, train_groups)
    test_reference = _reference(recipe, session, policy, frozen, test_groups)
    model = prepare(policy, session.accelerator)
    if frozen is not None and recipe.dpo.reference == "online":
        shard(frozen, session.accelerator)
    del models, frozen  # a cached reference is not needed any more

    def loss_with(reference: Reference) -> LossFn:
        def loss_fn(batch: TokenBatch, groups: Sequence[TokenGroup]) -> StepOutput:
            statistics = model(batch, statistics=recipe.dpo.wpo_weights)
            balance = router_loss(policy, batch)  # before the policy runs as its own reference
            output = _loss(recipe.dpo, statistics, reference(batch, groups), batch)
            pairs = len(batch.sequences) / 2
            return add_router_loss(output, balance, coef=aux_coef, units=pairs)

        return loss_fn

    data = (train_data.batches(recipe.train.minibatch), test_groups)
    objective = Objective(loss_with(train_reference), loss_with(test_reference))
    before, after = train(model, data, objective, session, recipe)
    save_policy(model, session)
    session.run.finish(change(before, after), held_out=after)


def _load(recipe: DPORecipe, session: Session) -> Policy:
    """Load the policy to train, with its options."""
    policy = load_policy(
        recipe.model,
        device=session.accelerator.device,
        lora=recipe.lora,
        gradient_checkpointing=recipe.gradient_checkpointing,
        **recipe.loading,
    )
    policy.activation_offload = recipe.activation_offload
    use_router_loss(policy, recipe.train.router_aux_coef, session)
    return policy


def _loss(
    options: DPOConfig, statistics: TokenStatistics, ref_logprobs: Tensor, batch: TokenBatch
) -> StepOutput:
    """Compute the loss of one microbatch, whose sequences are chosen, rejected, chosen, ..."""
    logprobs, lengths = sequence_sums(statistics.logprobs, batch)
    losses = dpo_loss(
        logprobs[0::2],
        logprobs[1::2],
        ref_logprobs[0::2],
        ref_logprobs[1::2],
        beta=options.beta,
        loss_type=options.loss_type,
        label_smoothing=options.label_smoothing,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        f_divergence=options.f_divergence,
        f_alpha=options.f_alpha,
        **{name: getattr(options, name) for name in OPTIONS},
    )
    per_example = losses.per_example
    if options.wpo_weights:
        gap = statistics.logprobs.detach() - statistics.log_collision
        mean_gap = sequence_sums(gap, batch)[0] / lengths
        per_example = per_example * wpo_weights(mean_gap[0::2], mean_gap[1::2])
    if options.sft_coef:
        per_example = per_example + options.sft_coef * sft_term(logprobs[0::2], lengths[0::2])
    margin = losses.chosen_rewards - losses.rejected_rewards
    count = float(len(margin))
    means = {
        "loss": per_example,
        "rewards_chosen": losses.chosen_rewards,
        "rewards_rejected": losses.rejected_rewards,
        "rewards_margin": margin,
        "accuracy": (margin > 0).float(),
        "logprobs_chosen": logprobs[0::2],
        "logprobs_rejected": logprobs[1::2],
    }
    sums = {name: (value.sum().item(), count) for name, value in means.items()}
    return StepOutput(per_example.sum(), sums)


def sequence_sums(values: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Sum over each sequence's counted tokens, and count them, in the batch's order."""
    sequence, _ = counted_coordinates(batch)
    numbers = torch.from_numpy(batch_sequences(batch)).to(values.device)
    # a batch's sequences are in ascending order
    index = torch.searchsorted(numbers, sequence)
    sums = values.new_zeros(len(numbers)).index_add(0, index, values)
    return sums, torch.bincount(index, minlength=len(numbers)).to(values.dtype)


def _reference(
    recipe: DPORecipe,
    session: Session,
    policy: Policy,
    frozen: Policy | None,
    groups: Sequence[TokenGroup],
) -> Reference:
    """Make the source of reference log-probs: disk, the adapter off, or a second model."""
    if not LOSSES[recipe.dpo.loss_type].reference:
        return lambda batch, groups: torch.zeros(len(batch.sequences), device=policy.device)

    @torch.no_grad()
    def adapter_switched_off(batch: TokenBatch, groups: Sequence[TokenGroup]) -> Tensor:
        with adapter_off(policy.model):
            return sequence_sums(policy(batch).logprobs, batch)[0]

    if recipe.dpo.reference == "adapter_off":
        return adapter_switched_off
    # a new adapter has no effect yet, so before training the policy is its own reference
    reference = frozen or policy

    @torch.no_grad()
    def online(batch: TokenBatch, groups: Sequence[TokenGroup]) -> Tensor:
        return sequence_sums(reference(batch).logprobs, batch)[0]

    if recipe.dpo.reference == "online":
        return online
    cache = ReferenceCache.compute(
        reference,
        cast(TokenGroups, groups),  # a stream was refused with it
        online,
        folder=session.run.folder.parent / "reference_cache",
        tokens_per_microbatch=recipe.train.tokens_per_microbatch,
        accelerator=session.accelerator,
    )
    return cache.lookup


def _frozen(recipe: DPORecipe, session: Session) -> Policy | None:
    """Load the second model, if the recipe needs one."""
    if recipe.dpo.reference_model is None and recipe.dpo.reference != "online":
        return None
    if recipe.dpo.reference_model is not None:
        require_same_vocabulary("dpo.reference_model", recipe.dpo.reference_model, recipe, session)
    return load_policy(
        recipe.dpo.reference_model or recipe.model,
        device=session.accelerator.device,
        frozen=True,
        **recipe.loading,
    )
