"""``align check``: print what a recipe will run, without loading any weights.

Rows are read and checked as in the run; models are counted in ``models/sizes.py``, memory in
``check_memory.py``. Models and data that are not on this machine are named, never fetched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.base.suggest import did_you_mean
from align.commands.check_memory import microbatch_tokens, models_and_memory
from align.config.keys import DPORecipe, EvalRecipe, GenerateRecipe, IterateRecipe, PPORecipe
from align.config.sections import DataConfig, DataSource
from align.data.formats.fields import Kind
from align.models.checks import check_models, check_tokenizers, check_weights
from align.models.sizes import find_config
from align.stages import STAGES
from align.training.distributed import check_trackers
from align.types import AlignError, PromptExample


def check(command: str, recipe: Any) -> Iterator[str]:
    """Yield the lines that ``align check`` prints; keys and values were validated on reading."""
    kind = STAGES[command].rows
    check_trackers(getattr(recipe, "trackers", ()))
    yield f"command     align {command}"
    yield f"output_dir  {recipe.output_dir}{_output_note(command, recipe)}"
    if kind is None:
        yield from _rounds(recipe)
        return
    if isinstance(recipe, DPORecipe):
        from align.stages.dpo_options import check_options

        check_options(recipe)
    if isinstance(recipe, PPORecipe):
        from align.stages.ppo.options import check_options as check_ppo_options

        check_ppo_options(recipe)
    for key in ("reward", "gold_reward"):
        if any(term.function for term in getattr(recipe, key, ())):
            from align.rewards import check_functions

            for found in check_functions(key, getattr(recipe, key)):
                yield f"{key:<11} {found.name}: found"
    if isinstance(recipe, EvalRecipe):
        from align.evaluation.harness import check_plugins

        check_plugins(recipe)
    check_models(command, recipe)
    check_tokenizers(command, recipe)
    check_weights(command, recipe)
    yield from _notes(recipe)
    rows = 0
    sample: list[Any] = []
    prompts: list[PromptExample] = []
    for name in ("train", "test"):
        for source in getattr(recipe.data, name):
            streamed = name == "train" and recipe.data.streaming
            read = _read_beginning if streamed else _read_as_the_run
            examples, line = read(source, recipe.data, kind)
            _check_references(recipe, examples)
            prompts += [e for e in examples if isinstance(e, PromptExample)]
            if name == "train":
                rows += 0 if streamed else len(examples)
                sample += examples[:: math.ceil(len(examples) / SAMPLED) or 1]
            label = "data" if isinstance(recipe, EvalRecipe | GenerateRecipe) else f"data.{name}"
            yield f"{label:<11} {line}"
    _check_functions(recipe, prompts)
    most = recipe.data.max_train_rows
    if most is not None and most < rows:
        yield f"data        {most:,} of them are used, picked by seed (data.max_train_rows)"
    yield from _schedule(recipe, rows)
    tokens_per_row, dropped = _tokenised(recipe, sample)
    yield from (f"data        {line} (of {len(sample):,} rows tokenised)" for line in dropped)
    yield from models_and_memory(command, recipe, tokens_per_row)
    yield from (f"not here    {line}" for line in _only_elsewhere(recipe))


def _rounds(recipe: IterateRecipe) -> Iterator[str]:
    from align.stages.iterate import stage_recipes

    yield f"rounds      at most {recipe.rounds}, each of these stages"
    for name, stage in stage_recipes(recipe).items():
        yield f"{name:<11} {getattr(recipe, name)}: {_first_source(stage.data)}"


def _only_elsewhere(recipe: Any) -> Iterator[str]:
    """List what this machine cannot run of the recipe, though another may."""
    import torch

    from align.models import offload
    from align.models.attention import choose
    from align.rollout.engine import require_engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = [partial(choose.require_gpu, recipe.attention, device)]
    if getattr(recipe, "activation_offload", False):
        checks.append(partial(offload.require_gpu, device))
    for name in ("generation", "sampling"):
        if getattr(recipe, name, None) is not None:
            checks.append(partial(require_engine, getattr(recipe, name)))
    found: dict[str, None] = {}  # two sections with one engine give one line
    for require in checks:
        try:
            require()
        except AlignError as error:
            found[str(error)] = None
    yield from found


def _check_functions(recipe: Any, prompts: Sequence[PromptExample]) -> None:
    """Refuse a reward function whose arguments are not columns of the data."""
    from align.rewards import check_functions, columns_of

    for key in ("reward", "gold_reward"):
        if prompts and any(term.function for term in getattr(recipe, key, ())):
            check_functions(key, getattr(recipe, key), columns_of(prompts))


def _check_references(recipe: Any, examples: Sequence[Any]) -> None:
    """Refuse a metric on prompts without references."""
    metrics = [term.metric for term in getattr(recipe, "reward", ()) if term.metric]
    for example in examples if metrics else ():
        if isinstance(example, PromptExample) and not example.references:
            raise AlignError(
                f"{example.id}: references: missing, which reward.metric={metrics[0]} compares "
                "with; add the column, or name yours: data.columns.references=NAME"
            )


SAMPLED = 2000
"""Most rows of a source that are tokenised to estimate lengths and drops."""


def _read_as_the_run(source: DataSource, data: DataConfig, kind: Kind) -> tuple[Sequence[Any], str]:
    """Read and check the rows of one source as the run will."""
    from align.data.examples import load_examples, with_columns
    from align.data.formats.unread import not_read

    not_here = _not_here(source)
    if not_here:
        return (), f"{not_here}; rows not counted"
    sources = with_columns((source,), data.columns)
    loaded = load_examples(sources, kind=kind, on_bad_row=data.on_bad_row)
    dropped = sum(sum(report.dropped.values()) for report in loaded.reports)
    note = f", {dropped:,} left out" if dropped else ""
    unread = (name for report in loaded.reports for name in report.unread)
    note += not_read(unread, (report.noted for report in loaded.reports))
    return loaded.examples, f"{source.path}: {len(loaded.examples):,} rows{note}"


def _read_beginning(source: DataSource, data: DataConfig, kind: Kind) -> tuple[Sequence[Any], str]:
    """Read and check the first rows of a streamed source as the run will."""
    from align.data.examples import with_columns
    from align.data.formats.unread import not_read
    from align.data.readers.source_rows import SourceRows
    from align.data.stream_counts import SourceCounts, examples_of, require_some

    not_here = _not_here(source)
    if not_here:
        return (), f"{not_here}; nothing read"
    (source,) = with_columns((source,), data.columns)
    rows, counts = SourceRows(source), SourceCounts(source.path)
    examples: list[Any] = []
    options = {"kind": kind, "on_bad_row": data.on_bad_row, "seed": 0}
    while counts.num_read < SAMPLED and (row := next(rows, None)) is not None:
        examples += examples_of(row, source, counts, **options)  # type: ignore[arg-type]
    if counts.num_read < SAMPLED:
        require_some(counts, source, kind)
    bad = counts.bad.reasons.total()
    note = f", {bad:,} left out" if bad else ""
    note += not_read(counts.unread, [counts.noted.reasons])
    whole = "" if counts.num_read < SAMPLED else "; what is behind them is read by the run alone"
    return examples, f"{source.path}: streamed; read here: {counts.num_read:,} rows{note}{whole}"


def _not_here(source: DataSource) -> str:
    """Say why a source cannot be read now; "" if it can.

    Raises:
        AlignError: It cannot be read later either.
    """
    from align.data.sources import as_a_list
    from align.models.locate import looks_like_hub_id

    path = Path(source.path)
    if path.exists():
        return ""
    if looks_like_hub_id(source.path):
        return f"{source.path} [{source.split}]: a hub data set"
    listed = as_a_list(source.path)
    if listed:
        raise AlignError(f"data: {source.path}: no such file or folder; {listed}")
    if path.parent.is_dir():
        raise AlignError(f"data: {path}: no such file or folder{did_you_mean(path)}")
    return f"{source.path}: not there yet, nor is its folder"


def _notes(recipe: Any) -> Iterator[str]:
    """List unread files in the data's folders; refuse to train on held-out rows."""
    from align.data.held_out import notes_of, refuse_shared
    from align.models.locate import looks_like_hub_id

    def is_there(source: DataSource) -> bool:
        return Path(source.path).expanduser().exists() or looks_like_hub_id(source.path)

    train, test = (
        [source for source in sources if is_there(source)]
        for sources in (recipe.data.train, recipe.data.test)
    )
    if not isinstance(recipe, EvalRecipe):
        refuse_shared(train, test)
    yield from (f"data        {note}" for note in notes_of([*train, *test]))


def _first_source(data: DataConfig) -> str:
    return (*data.train, *data.test)[0].path


def _tokenised(recipe: Any, sample: Sequence[Any]) -> tuple[float | None, list[str]]:
    """Return mean tokens of a row, shared prompts once, and drops; None without the model.

    Prompts of an evaluation are never dropped for their length.
    """
    from align.data.tokens.chat import encode_some
    from align.models.load import load_tokenizer

    model = getattr(recipe, "model", None)
    options = {"trust_remote_code": recipe.trust_remote_code, "base_model": recipe.base_model}
    if not sample or not model or find_config(model, **options)[0] is None:
        return None, []
    tokenizer = load_tokenizer(model, **options)
    found = encode_some(
        tokenizer,
        sample,
        max_tokens=2**31 if isinstance(recipe, EvalRecipe) else recipe.data.max_tokens,
        on_bad_row=recipe.data.on_bad_row,
        loss_on=recipe.data.loss_on,
    )
    dropped = [f"drops {count:,}: {reason}" for reason, count in found.dropped.items()]
    mean = sum(group.num_tokens for group in found.groups) / max(len(found.groups), 1)
    return mean or None, dropped


def _output_note(command: str, recipe: Any) -> str:
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise AlignError(f"output_dir: {folder} is a file; name a folder")
    if not (folder / "manifest.json").is_file():
        return ""
    if recipe.overwrite:
        return " (holds a run, which is overwritten)"
    if getattr(recipe, "resume", "never") == "auto":
        return " (holds a run, which is resumed)"
    resume = " or resume=auto" if STAGES[command].resumable else ""
    return f" (holds a run already: refused without overwrite=true{resume})"


def _schedule(recipe: Any, rows: int) -> Iterator[str]:
    if isinstance(recipe, PPORecipe):
        ppo, generation = recipe.ppo, recipe.generation
        steps = ppo.iterations * ppo.epochs * ppo.num_minibatches
        minibatch = math.ceil(ppo.rollout_batch / ppo.num_minibatches)
        yield (
            f"rollouts    {ppo.iterations:,} of {ppo.rollout_batch:,} sequences, "
            f"at most {generation.max_new_tokens:,} new tokens each"
        )
        yield (
            f"steps       {steps:,} = {ppo.iterations:,} iterations x {ppo.epochs} epochs x "
            f"{ppo.num_minibatches} minibatches of {minibatch:,} sequences"
        )
    elif isinstance(recipe, EvalRecipe | GenerateRecipe):
        per_prompt = recipe.generation.samples_per_prompt
        yield f"samples     {per_prompt} for each prompt, {recipe.generation.slots} side by side"
    else:
        yield f"steps       {_steps_in_words(recipe, rows)}"
    tokens = microbatch_tokens(recipe)
    yield f"microbatch  {tokens:,} tokens on each device (sets the memory, not the result)"


def _steps_in_words(recipe: Any, rows: int) -> str:
    train, data = recipe.train, recipe.data
    of = f"minibatches of {train.minibatch:,} over all processes"
    if train.max_steps is not None:
        return f"{train.max_steps:,} {of}"
    if not rows:
        return f"{train.epochs:g} epochs of {of}; the rows are not known yet"
    used = rows if data.test else round(rows * (1 - data.test_fraction))
    used = min(used, data.max_train_rows or used)
    steps = math.ceil(used * train.epochs / train.minibatch)
    return f"about {steps:,} {of}: {train.epochs:g} epochs of {used:,} training rows"
