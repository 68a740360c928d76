"""Supervised fine-tuning: negative log-likelihood per counted token.

Loss = sum of NLL over counted tokens / counted tokens of the global minibatch, so packing,
accumulation and the number of processes change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.base.progress import change
from align.config.keys import SFTRecipe
from align.losses import nll_loss
from align.models import load_policy
from align.models.load import weights_hash
from align.models.router import router_loss
from align.stages.common import (
    describe_model,
    open_session,
    save_policy,
)
from align.stages.data import load_data
from align.stages.router import add_router_loss, use_router_loss
from align.training.distributed import prepare
from align.training.loop import train
from align.training.objective import Objective, StepOutput
from align.types import TokenBatch, TokenGroup


def run(recipe: SFTRecipe) -> None:
    """Train ``recipe.model`` on demonstrations and save it in ``output_dir/model``."""
    session = open_session(recipe, "sft")
    train_data, test_data = load_data(
        session, recipe.data, "sft", seed=recipe.seed, train=recipe.train
    )
    policy = load_policy(
        recipe.model,
        device=session.accelerator.device,
        lora=recipe.lora,
        gradient_checkpointing=recipe.gradient_checkpointing,
        from_scratch=recipe.from_scratch,
        **recipe.loading,
    )
    policy.activation_offload = recipe.activation_offload
    aux_coef = recipe.train.router_aux_coef
    use_router_loss(policy, aux_coef, session)
    session.run.describe(
        start_weights=weights_hash(policy.inner), **describe_model(policy, session)
    )
    model = prepare(policy, session.accelerator)

    def loss_fn(batch: TokenBatch, groups: Sequence[TokenGroup]) -> StepOutput:
        loss = nll_loss(model(batch).logprobs, denominator=1)
        balance = router_loss(policy, batch)
        count = float(batch.loss_mask.sum())
        output = StepOutput(loss, {"loss": (loss.item(), count)})
        return add_router_loss(output, balance, coef=aux_coef, units=count)

    data = (train_data.batches(recipe.train.minibatch), test_data.groups)
    objective = Objective(
        loss_fn, num_units=lambda group: group.num_counted, derive=held_out_perplexity
    )
    before, after = train(model, data, objective, session, recipe)
    save_policy(model, session)
    session.run.finish(change(before, after), held_out=after)


def held_out_perplexity(found: Mapping[str, float]) -> dict[str, float]:
    """Return exp(loss), of a finite number whatever the loss."""
    return {"perplexity": math.exp(min(found["loss"], 700.0))}
