"""What every stage begins with: an accelerator, a run folder, tokenised data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from align.config import CommonRecipe, DataConfig
from align.data.chat import encode_examples, end_token_ids
from align.data.preferences import Example, load_examples, split_by_prompt, with_columns
from align.data.subset import pick
from align.models import Policy, load_tokenizer
from align.progress import say, track
from align.recipes_io import to_yaml
from align.run_folder import Run
from align.training.distributed import make_accelerator
from align.types import AlignError, DataSource, SourceReport, TokenGroup

Kind = Literal["sft", "preference", "prompt"]


@dataclass(frozen=True)
class Session:
    """An open stage: where it runs, where it writes, and its tokenizer."""

    accelerator: Accelerator
    run: Run
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """Rows of one side of the split, tokenised; ``examples[i]`` made ``groups[i]``.

    Plain text cut into pieces has more groups than examples; nothing else has.
    """

    examples: tuple[Any, ...]
    groups: list[TokenGroup]


def open_session(recipe: CommonRecipe, stage: str) -> Session:
    """Check the output folder before anything slow, then load the tokenizer."""
    accelerator = make_accelerator(recipe.trackers, recipe.output_dir)
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM", "FSDP"):
        raise AlignError(
            f"accelerate: {accelerator.distributed_type.value} is not supported yet; launch with "
            "data parallelism (DDP), as recipes/accelerate/ does"
        )
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    run = Run(
        stage,
        recipe.output_dir,
        config_yaml=to_yaml(recipe),
        seed=recipe.seed,
        resume=recipe.resume,
        overwrite=recipe.overwrite,
        is_main=accelerator.is_main_process,
    )
    torch.manual_seed(recipe.seed)
    if recipe.trackers:
        run.trackers.append(_tracker(accelerator, stage, to_yaml(recipe)))
    if accelerator.is_main_process:
        say(f"{stage}: {recipe.model} -> {recipe.output_dir} on {accelerator.device}")
    return Session(accelerator, run, tokenizer)


def _tracker(accelerator: Accelerator, stage: str, recipe: str) -> Callable[..., None]:
    """Accelerate's trackers, opened with the first numbers: by then the run has begun."""
    opened: list[bool] = []

    def log(metrics: dict[str, float], step: int) -> None:
        if not opened:
            accelerator.init_trackers(f"align-{stage}", config={"recipe": recipe})
            opened.append(True)
        accelerator.log(metrics, step=step)

    return log


def load_data(session: Session, data: DataConfig, kind: Kind, *, seed: int) -> tuple[Split, Split]:
    """Training and held-out rows, with what was read and dropped in the manifest."""
    train, reports = _read(data.train, data, kind, seed)
    if not train:
        raise AlignError("data.train: no data given; name a file, a folder or a hub data set")
    if data.test:
        test, test_reports = _read(data.test, data, kind, seed)
    else:
        train, test = split_by_prompt(train, test_fraction=data.test_fraction, seed=seed)
        test_reports = ()
    train = pick(train, data.max_train_rows, seed)
    test = pick(test, data.max_test_rows, seed)
    train_split, dropped_train = _encode(session, train, data)
    test_split, dropped_test = _encode(session, test, data)
    session.run.describe_data(train=reports, test=test_reports)
    facts = {
        "train_rows": len(train_split.examples),
        "test_rows": len(test_split.examples),
        "train_tokens": sum(g.num_tokens for g in train_split.groups),
        "dropped_when_tokenised": {"train": dropped_train, "test": dropped_test},
    }
    session.run.describe(**facts)
    world = session.accelerator.num_processes
    if min(len(train_split.groups), len(test_split.groups) or world) < world:
        raise AlignError(f"data: {world} processes need at least as many rows on each side")
    if session.run.is_main:
        _tell(reports, dropped_train, facts)
    return train_split, test_split


def policy_end_ids(policy: Policy, session: Session) -> tuple[int, ...]:
    """What ends a response: the model's own end tokens and its chat template's."""
    return end_token_ids(session.tokenizer, policy.inner.generation_config.eos_token_id)


def save_policy(policy: Policy, session: Session) -> None:
    """The trained model in ``output_dir/model``."""
    end_ids = policy_end_ids(policy, session)
    policy.save(session.run.folder / "model", session.tokenizer, end_ids=end_ids)


def require_same_vocabulary(key: str, model: str, recipe: CommonRecipe, session: Session) -> None:
    """Refuse a model that does not speak of the policy's tokens."""
    if not same_vocabulary(model, recipe, session):
        raise AlignError(
            f"{key}: {model} has another vocabulary than {recipe.model}, so its numbers would be "
            "of other tokens; name a model with the same tokenizer"
        )


def same_vocabulary(model: str, recipe: CommonRecipe, session: Session) -> bool:
    other = load_tokenizer(model, trust_remote_code=recipe.trust_remote_code)
    return bool(other.get_vocab() == session.tokenizer.get_vocab())


def trained_parameters(model: torch.nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _read(
    sources: Sequence[DataSource], data: DataConfig, kind: Kind, seed: int
) -> tuple[tuple[Example, ...], tuple[SourceReport, ...]]:
    if not sources:
        return (), ()
    named = with_columns(sources, data.columns)
    loaded = load_examples(named, kind=kind, on_bad_row=data.on_bad_row, seed=seed)
    return loaded.examples, loaded.reports


def _encode(
    session: Session, examples: Sequence[Example], data: DataConfig
) -> tuple[Split, dict[str, int]]:
    groups, owners, dropped = encode_examples(
        session.tokenizer,
        track(examples, "tokenise", shown=session.run.is_main),  # type: ignore[arg-type]
        max_tokens=data.max_tokens,
        on_bad_row=data.on_bad_row,
        loss_on=data.loss_on,
    )
    if dropped:
        examples = [examples[i] for i in dict.fromkeys(owners)]
    return Split(tuple(examples), groups), dropped


def _tell(reports: Sequence[SourceReport], dropped: dict[str, int], facts: dict[str, Any]) -> None:
    say(
        f"  data: {facts['train_rows']} rows ({facts['train_tokens']} tokens), "
        f"{facts['test_rows']} more held out"
    )
    reasons = dict(dropped)
    for report in reports:
        for reason, count in report.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    for reason, count in reasons.items():
        say(f"  dropped {count} rows: {reason}")
