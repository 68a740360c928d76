"""Recipes as frozen dataclasses: every key of every YAML file, its unit and its default.

Reading YAML and overrides into these lives in ``recipes_io.py``. Nothing here is changed after it
was read, and nothing is repaired: what a stage runs is what ``config.yaml`` in its folder says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.config.options import (
    GenerationOptions,
    LoraOptions,
    OptimOptions,
    PPOTrainOptions,
    TrainOptions,
)
from align.types import DataSource, RewardTerm

Precision = Literal["auto", "bf16", "fp32"]
Attention = Literal["auto", "segments", "flash", "flex"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and what is done with bad ones.

    In a recipe ``data: file.jsonl`` and ``data: [a.jsonl, {path: b.jsonl, weight: 0.5}]`` are short
    for ``data: {train: ...}``.
    """

    train: tuple[DataSource, ...] = ()
    test: tuple[DataSource, ...] = ()
    # our field -> the file's column, for every source that does not say so itself
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: Literal["stop", "skip"] = "stop"
    # tokens, prompt and response together; longer rows are bad rows, never cut
    max_tokens: int = 1024
    # share of the prompts held out when `test` is empty; 0 holds out nothing
    test_fraction: float = 0.05
    # rows used at most, after the split, picked by seed; null uses all
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    # in which order an epoch goes through the rows: shuffled anew each epoch, as the sources list
    # them (a curriculum), or by their tokens
    order: Literal["shuffled", "given", "shortest_first"] = "shuffled"
    # tokens that SFT learns from: auto = completions in dialogue, everything in plain text
    loss_on: Literal["auto", "completion", "all"] = "auto"
    # sft, rm, dpo: read the training rows as steps need them, again from the start where they end,
    # and keep them nowhere; for a data set larger than the disk. Needs `train.max_steps`
    streaming: bool = False
    # rows that lie in memory at a time, beside as many next ones, and are shuffled among themselves
    streaming_window: int = 10000


@dataclass(frozen=True, kw_only=True)
class CommonRecipe:
    """What every stage's recipe has."""

    # folder or hub id of the model to start from
    model: str
    output_dir: str
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    # auto = bf16 autocast over fp32 weights where the hardware multiplies bf16 natively
    precision: Precision = "auto"
    # kernel of packed attention: auto = flash or flex on a GPU in bf16 where it proves right on the
    # model, else segments, which runs everywhere
    attention: Attention = "auto"
    # recompute activations in the backward pass: about a third slower, far less memory
    gradient_checkpointing: bool = False
    # keep activations in the CPU's memory until the backward pass needs them, for a GPU: slower;
    # beside gradient_checkpointing it moves what that keeps
    activation_offload: bool = False
    trust_remote_code: bool = False
    # base of the adapters that the recipe names as models, instead of the one that their
    # adapter_config.json names; null = as they say
    base_model: str | None = None
    # never refuses a folder that holds a run; auto goes on from its newest whole checkpoint
    resume: Literal["never", "auto"] = "never"
    overwrite: bool = False
    # Accelerate's live trackers: tensorboard, wandb, trackio; [] for none
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(CommonRecipe):
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None
    # make the model anew from the `config.json` in `model` (random weights) instead of loading it
    from_scratch: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    # subtract the pair's `margin` inside the sigmoid, where the data have one
    use_margin: bool = False
    # weight of (r_chosen + r_rejected)^2, which keeps scores near 0
    center_coef: float = 0.0
    # after training, scale the head so that scores on (at most 100) training pairs have variance 1
    normalize: bool = True
    # append a decoder layer that starts as the mean over the sequence: a small backbone learns from
    # far fewer pairs; not with lora, and only where the head is new
    pooling_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(CommonRecipe):
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    # temperature of the implicit reward, reward units per nat
    beta: float = 0.1
    # a name from align.losses.dpo
    loss_type: str = "sigmoid"
    # probability that a label is wrong (sigmoid: cDPO; robust; exo_pair)
    label_smoothing: float = 0.0
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    # alpha of the alpha divergence
    f_alpha: float = 0.5
    # weight of the token-mean NLL on chosen (RPO); 0 = off
    sft_coef: float = 0.0
    # target margin of simpo, weight of orpo's odds-ratio term
    simpo_gamma: float = 0.5
    orpo_coef: float = 0.1
    # weight pairs by how likely the policy would write them (WPO)
    wpo_weights: bool = False
    # where reference log-probs come from: a second model, the policy with its adapter off, or disk
    reference: Literal["online", "adapter_off", "cached"] = "cached"
    # folder or hub id of the reference; null = the model that training starts from
    reference_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class DPORecipe(CommonRecipe):
    dpo: DPOConfig = field(default_factory=DPOConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    # reward units per nat
    coef: float = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    # reward = charged on every token's reward; loss = a term of the policy loss
    charge: Literal["reward", "loss"] = "reward"
    # move coef so that KL per response stays near `target` nats, over `horizon` sequences
    adaptive: bool = False
    target: float = 6.0
    horizon: int = 10000


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    # samples of prompts, each trained on for `epochs` passes
    iterations: int = 100
    # sequences per iteration, over all processes
    rollout_batch: int = 64
    epochs: int = 4
    # optimizer steps per epoch
    num_minibatches: int = 1
    clip_range: float = 0.2
    # 0 = no clipping of the value loss
    value_clip_range: float = 0.2
    # weight of the entropy bonus, reward units per nat
    entropy_coef: float = 0.0
    # of advantages, a name from align.losses.advantages.ESTIMATORS
    estimator: str = "gae"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    # variance 1, mean kept: changes the effective KL coefficient
    whiten_rewards: bool = False
    # what a response that did not end in EOS is paid, where a reward model's own mean counts as 0;
    # null = its own score, judged as if it had ended there
    missing_eos_score: float | None = -1.0
    # iterations in which the critic alone learns
    critic_warmup: int = 0


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    # folder or hub id of a one-label model; null = the first reward model, else the actor's trunk
    model: str | None = None
    # peak learning rate; null = the actor's
    lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class PPORecipe(CommonRecipe):
    # one reward or a weighted sum
    reward: tuple[RewardTerm, ...] = ()
    # folder or hub id; null = the model that training starts from
    reference_model: str | None = None
    ppo: PPOConfig = field(default_factory=PPOConfig)
    train: PPOTrainOptions = field(default_factory=PPOTrainOptions)
    kl: KLConfig = field(default_factory=KLConfig)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How scored samples of one prompt become preference pairs."""

    # best_worst = one pair per prompt; all = every pair that differs enough; threshold = every
    # response at or above `threshold` against every one below it
    choose: Literal["best_worst", "all", "threshold"] = "best_worst"
    # score units, for choose=threshold
    threshold: float = 0.0
    # score units by which chosen must beat rejected
    min_margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GenerateRecipe(CommonRecipe):
    """Sample responses, score them if there is a reward, and write pairs if there is `pairs`."""

    # further models that answer the same prompts; all samples of a prompt are ranked together
    also: tuple[str, ...] = ()
    # write the best sample of each prompt for sft (rejection-sampling fine-tuning)
    best_of_n: bool = False
    trackers: tuple[str, ...] = ()
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    reward: tuple[RewardTerm, ...] = ()
    pairs: PairsConfig | None = None
    tokens_per_microbatch: int = 4096


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    """One table over one or several checkpoints, on held-out prompts."""

    output_dir: str
    # a checkpoint, or several as name -> folder, hub id, GGUF file or JSONL of outputs; `ppo#0` and
    # `ppo#1` are two seeds of ppo, and compared as one
    model: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    # KL is measured against it; null = no KL
    reference_model: str | None = None
    reward: tuple[RewardTerm, ...] = ()
    # a reward that counts as true, beside the one that was optimised: shows over-optimisation
    gold_reward: tuple[RewardTerm, ...] = ()
    # corpus metrics against the references (align.evaluation.bleu lists them), and module:name of
    # your own: a function as for a reward, or an `evaluate` metric
    metrics: tuple[str, ...] = ("bleu", "chrf", "chrf++", "ter")
    # module:name of f(prompts, a, b, references) -> for each prompt 1 = a is better, 0 = b, 0.5 tie
    judge: str | None = None
    # reward units up to which two answers tie in the win rate
    tie_margin: float = 0.0
    # adds a model: of n samples of `reference_model` the best by `reward`; null = none
    best_of_n: int | None = None
    # preference pairs whose held-out side `reward` is judged on: `test`, or `test_fraction` of
    # `train`, which with equal seeds are the rows that `align rm` held out
    preferences: DataConfig = field(default_factory=DataConfig)
    # the outputs that BLEU, chrF and reward are measured on
    generation: GenerationOptions = field(
        default_factory=lambda: GenerationOptions(temperature=0.0)
    )
    # samples that KL and the sampled chrF are measured on; null = the outputs themselves
    sampling: GenerationOptions | None = None
    # resamplings of every paired test
    num_resamples: int = 1000
    # keep samples in outputs_cache/ beside the run, by weights, prompts and sampling
    cache_outputs: bool = True
    seed: int = 0
    precision: Precision = "auto"
    # kernel of packed attention: auto = flash or flex on a GPU in bf16 where it proves right on the
    # model, else segments, which runs everywhere
    attention: Attention = "auto"
    tokens_per_microbatch: int = 4096
    trust_remote_code: bool = False
    # base of the adapters that the recipe names as models, instead of the one that their
    # adapter_config.json names; null = as they say
    base_model: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When `align iterate` ends before its last round; null switches a rule off."""

    # KL to the starting model, nats per response, on held-out prompts
    max_kl: float | None = None
    # rounds without a higher gold score
    patience: int | None = None
    # pairs that a round has to yield
    min_pairs: int | None = None


@dataclass(frozen=True, kw_only=True)
class IterateRecipe:
    """Rounds of sampling, labelling, reward model, and PPO or online DPO."""

    # folder or hub id of the model before the first round
    model: str
    # `rounds/1`, `rounds/2`, ... lie in it, a folder for each stage in them
    output_dir: str
    # base of an adapter that `model` names, instead of the one that it names itself
    base_model: str | None = None
    # rounds at most; `stop` may end earlier
    rounds: int = 3
    # recipes (files or shipped names) of a round's stages; what labels the pairs is `generate`'s
    # reward, which is the gold score; model, data of pairs, and folders are set here
    generate: str
    # trained on the pairs of all rounds so far; null with `dpo` trains none
    rm: str | None = None
    # one of the two
    ppo: str | None = None
    # online DPO, on the round's own pairs
    dpo: str | None = None
    # measures each round, on held-out prompts, with `generate`'s reward and KL to the first model
    eval: str
    # `stage.key=value` over those recipes, such as generate.generation.slots=64
    set: tuple[str, ...] = ()
    # what KL is charged to: the model before the first round, the round's own start, or an average
    reference: Literal["fixed", "refresh", "average"] = "fixed"
    # share of the old average that each round keeps, for reference=average
    reference_decay: float = 0.5
    stop: StopRules = field(default_factory=StopRules)
    # each round adds its number to it
    seed: int = 0
    # never refuses a folder that holds a run; auto goes on where it was cut short
    resume: Literal["never", "auto"] = "never"
    # replace the run that the folder holds, its rounds included
    overwrite: bool = False
