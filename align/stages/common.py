"""Open a stage: accelerator, run folder, tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from align.base.progress import say
from align.config.keys import CommonRecipe
from align.config.load import to_yaml
from align.data.held_out import notes_of
from align.data.tokens.chat import end_token_ids
from align.models import Policy, load_tokenizer
from align.models.checks import check_models, other_vocabulary
from align.models.locate import name_on_the_hub
from align.models.offload import require_gpu
from align.models.policy import Packed
from align.run.files import at_end
from align.run.folder import Run
from align.stages import STAGES
from align.training.distributed import (
    check_sharding,
    gather_full_model,
    is_sharded,
    make_accelerator,
)
from align.training.session import Session
from align.types import AlignError


def open_session(recipe: CommonRecipe, stage: str) -> Session:
    """Check the output folder before anything slow, then load the tokenizer."""
    check_sharding(
        stage,
        shardable=STAGES[stage].shardable,
        activation_offload=recipe.activation_offload,
    )
    accelerator = make_accelerator(recipe.trackers, recipe.output_dir)
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM"):
        raise AlignError(
            f"accelerate: {accelerator.distributed_type.value} is not supported; launch with DDP "
            "or FSDP2, as recipes/accelerate/ does"
        )
    if recipe.activation_offload:
        require_gpu(accelerator.device)
    # report a misspelt file at once, before looking for a model on the hub
    notes = notes_of((*recipe.data.train, *recipe.data.test))
    for note in notes if accelerator.is_main_process else ():
        say(f"{stage}: {note}")
    check_models(stage, recipe)
    remote = name_on_the_hub(recipe.model, base_model=recipe.base_model)
    if accelerator.is_main_process and remote is not None:
        say(f"{stage}: {remote}: no such folder here; asking the hub, or its cache")
    tokenizer = load_tokenizer(
        recipe.model, trust_remote_code=recipe.trust_remote_code, base_model=recipe.base_model
    )
    run = Run(
        stage,
        recipe.output_dir,
        config_yaml=to_yaml(recipe),
        seed=recipe.seed,
        resume=recipe.resume,
        overwrite=recipe.overwrite,
        resumable=STAGES[stage].resumable,
        is_main=accelerator.is_main_process,
    )
    sharded = is_sharded() and accelerator.num_processes > 1
    run.describe(processes=accelerator.num_processes, sharded=sharded)
    set_seed(recipe.seed)
    if recipe.trackers:
        run.trackers.append(_tracker(accelerator, stage, to_yaml(recipe)))
    if accelerator.is_main_process:
        say(f"{stage}: {recipe.model} -> {recipe.output_dir} on {accelerator.device}")
    return Session(accelerator, run, tokenizer)


def _no_traceback_of_a_full_disk(failed: threading.ExceptHookArgs) -> None:
    """Silence TensorBoard's thread: the next log raises its error as one line with the folder."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _tracker(accelerator: Accelerator, stage: str, recipe: str) -> Callable[..., None]:
    """Open Accelerate's trackers with the first numbers, when the run has begun."""
    opened: list[bool] = []
    hook = threading.excepthook
    threading.excepthook = _no_traceback_of_a_full_disk

    def close() -> None:
        """Write out what is left: a notebook's process does not end with its run."""
        threading.excepthook = hook
        for tracker in accelerator.trackers if opened else ():
            with suppress(OSError):  # of a full disk, of which the run has told
                tracker.finish()

    at_end(close)

    def log(metrics: dict[str, float], step: int) -> None:
        if not opened:
            # purge TensorBoard's points of steps that a resumed run repeats
            again = {"tensorboard": {"purge_step": step}}
            accelerator.init_trackers(
                f"align-{stage}", config={"recipe": recipe}, init_kwargs=again
            )
            opened.append(True)
        accelerator.log(metrics, step=step)

    return log


def policy_end_ids(policy: Policy, session: Session) -> tuple[int, ...]:
    """List the ids that end a response: the model's own end tokens and its chat template's."""
    return end_token_ids(session.tokenizer, policy.inner.generation_config.eos_token_id)


def save_policy(model: torch.nn.Module, session: Session) -> None:
    """Save the trained model in ``output_dir/model``; every rank calls it."""
    policy = gather_full_model(model, session.accelerator)
    if policy is None:
        return
    end_ids = policy_end_ids(policy, session)
    policy.save(session.run.folder / "model", session.tokenizer, end_ids=end_ids)


def require_same_vocabulary(key: str, model: str, recipe: CommonRecipe, session: Session) -> None:
    """Refuse a model whose vocabulary is not the policy's."""
    if not same_vocabulary(model, recipe, session):
        raise other_vocabulary(key, model, recipe.model)


def same_vocabulary(model: str, recipe: CommonRecipe, session: Session) -> bool:
    other = load_tokenizer(
        model, trust_remote_code=recipe.trust_remote_code, base_model=recipe.base_model
    )
    return bool(other.get_vocab() == session.tokenizer.get_vocab())


def describe_model(model: Packed, session: Session) -> dict[str, Any]:
    """Print how a trained model runs; return its facts for the manifest."""
    if session.run.is_main:
        say(f"  {model.name}: precision {model.precision}, attention {model.attention}")
    return {
        "precision": model.precision,
        "attention": model.attention,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
