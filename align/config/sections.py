"""Sections of a recipe: every key with its type, default, range, unit and meaning.

The comment above a field is its meaning in docs/recipe-keys.md and in `align sft --help`. Models,
rollout, training and data take these sections as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from align.config.annotations import Range, Unit, When


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of rows."""

    # a local JSONL, JSON, Parquet, CSV or Arrow file (`.gz` allowed for the text formats), a folder
    # of such files, or a hub data set `org/name`
    path: str
    # the hub data set's configuration, if it has several
    name: str | None = None
    # split in the syntax of `datasets.load_dataset`, such as `test[:100]` and `train[10%:20%]`;
    # local files and folders take it too
    split: str = "train"
    # copies of the source when several are mixed: 2.0 repeats every row twice, 0.5 keeps half of
    # the rows
    weight: Annotated[float, Range("(0, 1000]"), Unit("copies per epoch")] = 1.0
    # our field -> the file's column, for files that name theirs otherwise
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources of rows, and the treatment of bad ones.

    In a recipe ``data: file.jsonl`` and ``data: [a.jsonl, {path: b.jsonl, weight: 0.5}]`` are short
    for ``data: {train: ...}``.
    """

    # sources of training rows
    train: tuple[DataSource, ...] = ()
    # held-out sources; empty = `test_fraction` of the training prompts
    test: tuple[DataSource, ...] = ()
    # our field -> the file's column, for every source that does not say so itself
    columns: dict[str, str] = field(default_factory=dict)
    # stop at the first bad row, or skip bad rows and count them by reason
    on_bad_row: Literal["stop", "skip"] = "stop"
    # longest row, prompt and response together; longer rows are bad rows, never cut
    max_tokens: Annotated[int, Range("[2, 100000000]"), Unit("tokens")] = 1024
    # part that is held out when `test` is empty; 0 holds out nothing
    test_fraction: Annotated[float, Range("[0, 1)"), Unit("share of the prompts")] = 0.05
    # training rows used at most, after the split, picked by seed; null uses all
    max_train_rows: Annotated[int | None, Range("[1, inf)"), Unit("rows")] = None
    # held-out rows used at most, after the split, picked by seed; null uses all
    max_test_rows: Annotated[int | None, Range("[1, inf)"), Unit("rows")] = None
    # in which order an epoch goes through the rows: shuffled anew each epoch, as the sources list
    # them (a curriculum), or by their tokens
    order: Literal["shuffled", "given", "shortest_first"] = "shuffled"
    # tokens that SFT learns from: auto = completions in dialogue, everything in plain text
    loss_on: Literal["auto", "completion", "all"] = "auto"
    # sft, rm, dpo: read the training rows as steps need them, again from the start where they end,
    # and keep them nowhere; for a data set larger than the disk. Needs `train.max_steps`
    streaming: bool = False
    # rows held in memory and shuffled among themselves, beside as many next ones
    streaming_window: Annotated[
        int, Range("[1, 100000000]"), Unit("rows"), When("streaming", True)
    ] = 10000


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters by peft; the model in ``model/`` is saved merged, the adapter beside it."""

    # rank
    r: Annotated[int, Range("[1, 65536]")] = 16
    # updates are scaled by alpha / r
    alpha: Annotated[float, Range("(0, 1000000]")] = 32.0
    # dropout on the adapters' input
    dropout: Annotated[float, Range("[0, 1)"), Unit("probability")] = 0.0
    # module names, or all-linear
    target_modules: tuple[str, ...] = ("all-linear",)
    # adapt the topmost layers only (the backward pass stops below them); null adapts every layer
    top_layers: Annotated[int | None, Range("[1, 10000]"), Unit("layers")] = None


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """The vLLM engine of a process, for ``engine=vllm``."""

    # GPU memory (main memory without a GPU) for its copy of the weights and its cache, beside what
    # training holds
    gpu_memory_utilization: Annotated[float, Range("(0, 1]"), Unit("share of the memory")] = 0.3
    # a prompt and its response together, at most
    max_tokens: Annotated[int, Range("[2, 100000000]"), Unit("tokens")] = 2048
    # neither compile nor capture CUDA graphs: starts sooner, samples slower
    eager: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Sampling of responses."""

    # longest response, its end token included
    max_new_tokens: Annotated[int, Range("[1, 100000000]"), Unit("tokens")] = 128
    # logits are divided by it; 0 = greedy
    temperature: Annotated[float, Range("[0, 100]")] = 1.0
    # probability mass kept, 1 = all (PPO allows 1 only)
    top_p: Annotated[float, Range("(0, 1]"), Unit("share")] = 1.0
    # responses for each prompt
    samples_per_prompt: Annotated[int, Range("[1, 100000]")] = 1
    # sequences decoded side by side
    slots: Annotated[int, Range("[1, 1000000]"), Unit("sequences")] = 64
    # what samples: align's own sampler, or vLLM in the same process (pip install
    # 'align-rlhf[vllm]'); log-probs are the policy's own with either
    engine: Literal["align", "vllm"] = "align"
    vllm: Annotated[VLLMOptions, When("engine", "vllm")] = field(default_factory=VLLMOptions)


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward source with its weight; exactly one of the first three is set."""

    # folder or hub id of a reward model (one label), with its tokenizer beside it
    model: str | None = None
    # `module:name` of a Python function `f(prompts, responses, references) -> list of floats`
    function: str | None = None
    # a sentence metric against the references, 0 to 100. `chrf1` is chrF with beta 1: sacreBLEU's
    # default, 2, counts recall twice, which a longer answer raises
    metric: Literal["chrf", "chrf1", "chrf++", "bleu"] | None = None
    # factor before the sum
    weight: Annotated[float, Range("[-1000000, 1000000]")] = 1.0
    # longest call of a function; null waits for ever
    timeout: Annotated[float | None, Range("(0, 10000000]"), Unit("seconds")] = 3600.0


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW and its schedule."""

    # peak learning rate
    lr: Annotated[float, Range("(0, inf)")] = 1e-5
    # shape of the learning rate after the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # warm-up, in which lr rises from 0
    warmup_fraction: Annotated[float, Range("[0, 1]"), Unit("share of the optimizer steps")] = 0.05
    # lr at the end
    final_lr_fraction: Annotated[
        float, Range("[0, 1]"), Unit("share of lr"), When("schedule", "cosine", "linear")
    ] = 0.0
    # AdamW: per step, times lr; none on norms and biases
    weight_decay: Annotated[float, Range("[0, 1000]")] = 0.0
    # AdamW: decay of the gradient's mean
    beta1: Annotated[float, Range("[0, 1)")] = 0.9
    # AdamW: decay of the gradient's square
    beta2: Annotated[float, Range("[0, 1)")] = 0.999
    # AdamW: added to the root of the second moment
    eps: Annotated[float, Range("(0, 1]")] = 1e-8
    # global gradient norm, applied once before every optimizer step
    max_grad_norm: Annotated[float, Range("(0, inf)")] = 1.0


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The part of `train` that every training stage has: memory, evaluations, checkpoints."""

    # budget of one forward and backward on one device: sets the memory, changes no result
    tokens_per_microbatch: Annotated[int, Range("[1, 1000000000]"), Unit("tokens")] = 4096
    # interval between held-out evaluations; 0 = at the start and the end only
    eval_every: Annotated[int, Range("[0, inf)"), Unit("optimizer steps, PPO: iterations")] = 0
    # interval between checkpoints; 0 = none, the model is saved at the end
    save_every: Annotated[int, Range("[0, inf)"), Unit("optimizer steps, PPO: iterations")] = 0
    # newest checkpoints that are kept
    keep_checkpoints: Annotated[int, Range("[1, inf)"), Unit("checkpoints")] = 2
    # on NaN or infinity (in logits, scores, values, losses or gradients): stop the run, or skip the
    # optimizer step (PPO: the minibatch, or the whole rollout) and count it
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions):
    """Number and size of optimizer steps, and what is written when."""

    # passes over the data
    epochs: Annotated[float, Range("(0, 100000]"), Unit("epochs")] = 1.0
    # length of the run; null = as many as `epochs` says
    max_steps: Annotated[int | None, Range("[1, 1000000000]"), Unit("optimizer steps")] = None
    # sequences (SFT) or pairs (RM, DPO) per optimizer step, over all processes
    minibatch: Annotated[int, Range("[1, 10000000]"), Unit("sequences or pairs")] = 16
    # weight of a mixture of experts' load-balancing loss, beside the stage's own; 0 = off (models'
    # configs name theirs router_aux_loss_coef: 0.001 to 0.02)
    router_aux_coef: Annotated[float, Range("[0, 1000]")] = 0.0
    # interval between lines of metrics.jsonl
    log_every: Annotated[int, Range("[1, inf)"), Unit("optimizer steps")] = 1
    # held-out number that chooses the best checkpoint, which is kept and saved as `model/` at the
    # end; null saves the last
    keep_best: Literal["loss", "accuracy"] | None = None


@dataclass(frozen=True, kw_only=True)
class PPOTrainOptions(LoopOptions):
    """Memory, evaluations and checkpoints of PPO."""

    # held-out number that chooses the best checkpoint, which is kept and saved as `model/` at the
    # end; null saves the last
    keep_best: Literal["score"] | None = None


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The price of KL to the reference."""

    # price of KL to the reference
    coef: Annotated[float, Range("[0, 10000]"), Unit("reward units per nat")] = 0.05
    # log-ratio, half of its square, or the non-negative unbiased one
    estimator: Literal["k1", "k2", "k3"] = "k1"
    # reward = charged on every token's reward; loss = a term of the policy loss
    charge: Literal["reward", "loss"] = "reward"
    # move `coef` so that KL per response stays near `target`
    adaptive: bool = False
    # KL that an adaptive `coef` aims at
    target: Annotated[
        float, Range("(0, 1000000]"), Unit("nats per response"), When("adaptive", True)
    ] = 6.0
    # sequences over which `coef` may change by about a fifth
    horizon: Annotated[int, Range("[1, 1000000000]"), Unit("sequences"), When("adaptive", True)] = (
        10000
    )
