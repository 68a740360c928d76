"""Recipes as frozen dataclasses: every key of every YAML file, with the sections of one stage.

Each key has its type, default, range, unit and (as the comment above it) meaning here or in
sections.py. A recipe is never changed after it was read: what a stage runs is what ``config.yaml``
in its folder says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from align.config.annotations import Range, Unit, When
from align.config.sections import (
    DataConfig,
    GenerationOptions,
    KLConfig,
    LoraOptions,
    OptimOptions,
    PPOTrainOptions,
    RewardTerm,
    TrainOptions,
)


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Keys of every recipe that loads models."""

    # folder of the run
    output_dir: str
    data: DataConfig = field(default_factory=DataConfig)
    # seed of sampling, shuffling, splits and new heads
    seed: Annotated[int, Range("[0, 4294967295]")] = 0
    # auto = bf16 autocast over fp32 weights where the hardware multiplies bf16 natively
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # kernel of packed attention: auto = flash or flex on a GPU in bf16 where it proves right on the
    # model, else segments, which runs everywhere
    attention: Literal["auto", "segments", "flash", "flex"] = "auto"
    # run Python code that comes with a model from the hub
    trust_remote_code: bool = False
    # base of the adapters that the recipe names as models, instead of the one that their
    # adapter_config.json names; null = as they say
    base_model: str | None = None
    # replace the run that `output_dir` holds
    overwrite: bool = False

    @property
    def loading(self) -> dict[str, Any]:
        """Options of every model that the recipe loads, by the names of `align.models`."""
        return {
            "precision": self.precision,
            "attention": self.attention,
            "trust_remote_code": self.trust_remote_code,
            "base_model": self.base_model,
        }


@dataclass(frozen=True, kw_only=True)
class CommonRecipe(ModelRecipe):
    """Keys of every recipe that starts from one model."""

    # folder, hub id or GGUF file of the model to start from
    model: str
    # recompute activations in the backward pass: about a third slower, far less memory
    gradient_checkpointing: bool = False
    # keep activations in the CPU's memory until the backward pass needs them, for a GPU: slower;
    # beside gradient_checkpointing it moves what that keeps
    activation_offload: bool = False
    # never refuses a folder that holds a run; auto resumes from its newest whole checkpoint
    resume: Literal["never", "auto"] = "never"
    # Accelerate's live trackers: tensorboard, wandb, trackio; [] for none
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(CommonRecipe):
    """Fine-tune on demonstrations."""

    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None
    # make the model anew from the `config.json` in `model` (random weights) instead of loading it
    from_scratch: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The Bradley-Terry loss and the head of a reward model."""

    # subtract the pair's `margin` inside the sigmoid, where the data have one
    use_margin: bool = False
    # weight of (r_chosen + r_rejected)^2, which keeps scores near 0
    center_coef: Annotated[float, Range("[0, 10000]")] = 0.0
    # after training, scale the head so that scores on (at most 100) training pairs have variance 1
    normalize: bool = True
    # append a decoder layer that starts as the mean over the sequence: a small backbone learns from
    # far fewer pairs; not with lora, and only where the head is new
    pooling_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(CommonRecipe):
    """Train a reward model on pairs."""

    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """A DPO loss and its reference."""

    # temperature of the implicit reward
    beta: Annotated[float, Range("(0, 10000]"), Unit("reward units per nat")] = 0.1
    # name of a loss; "DPO losses" in docs/recipes.md lists them
    loss_type: str = "sigmoid"
    # probability that a label is wrong (sigmoid: cDPO; robust; exo_pair)
    label_smoothing: Annotated[float, Range("[0, 0.5)"), Unit("probability")] = 0.0
    # map of the log-ratios (sigmoid, hinge, robust, exo_pair)
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    # alpha of the alpha divergence
    f_alpha: Annotated[float, Range("[-1000, 1000]"), When("f_divergence", "alpha_divergence")] = (
        0.5
    )
    # weight of the token-mean NLL on chosen (RPO); 0 = off
    sft_coef: Annotated[float, Range("[0, 10000]")] = 0.0
    # margin that simpo asks for
    simpo_gamma: Annotated[float, Range("[0, 10000]"), Unit("reward units")] = 0.5
    # weight of orpo's odds-ratio term
    orpo_coef: Annotated[float, Range("[0, 10000]")] = 0.1
    # weight pairs by how likely the policy would write them (WPO)
    wpo_weights: bool = False
    # source of the reference log-probs: a second model, the policy with its adapter off, or disk
    reference: Literal["online", "adapter_off", "cached"] = "cached"
    # folder or hub id of the reference; null = the model that training starts from
    reference_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class DPORecipe(CommonRecipe):
    """Optimise preference pairs by DPO or a relative of it."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    lora: LoraOptions | None = None


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The PPO update: rollouts, clipping, advantages."""

    # rollouts, each trained on for `epochs` passes
    iterations: Annotated[int, Range("[1, 100000000]"), Unit("iterations")] = 100
    # sequences per iteration, over all processes
    rollout_batch: Annotated[int, Range("[1, 10000000]"), Unit("sequences")] = 64
    # passes over each rollout
    epochs: Annotated[int, Range("[1, 10000]"), Unit("epochs")] = 4
    # optimizer steps per epoch
    num_minibatches: Annotated[int, Range("[1, 1000000]")] = 1
    # how far the ratio to the old policy may leave 1 and still earn
    clip_range: Annotated[float, Range("(0, 1000]")] = 0.2
    # how far a value may leave the old one and still lower the loss; 0 = no clipping
    value_clip_range: Annotated[float, Range("[0, inf)"), Unit("reward units")] = 0.2
    # weight of the entropy bonus
    entropy_coef: Annotated[float, Range("[0, 10000]"), Unit("reward units per nat")] = 0.0
    # advantage estimator: a name from align.losses.advantages.ESTIMATORS
    estimator: str = "gae"
    # discount
    gamma: Annotated[float, Range("[0, 1]"), Unit("per token")] = 1.0
    # 0 = one-step residual, 1 = whole return minus value
    gae_lambda: Annotated[float, Range("[0, 1]")] = 0.95
    # shift and scale them to mean 0, variance 1 over the rollout
    whiten_advantages: bool = True
    # variance 1, mean kept: changes the effective KL coefficient
    whiten_rewards: bool = False
    # score of a response that did not end in EOS, where a reward model's own mean counts as 0;
    # null = its own score, judged as if it had ended there
    missing_eos_score: Annotated[
        float | None, Range("[-1000000, 1000000]"), Unit("reward units")
    ] = -1.0
    # iterations in which the critic alone learns
    critic_warmup: Annotated[int, Range("[0, inf)"), Unit("iterations")] = 0


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model of PPO."""

    # folder or hub id of a one-label model; null = the first reward model, else the
    # actor's backbone
    model: str | None = None
    # peak learning rate; null = the actor's
    lr: Annotated[float | None, Range("(0, inf)")] = None


@dataclass(frozen=True, kw_only=True)
class PPORecipe(CommonRecipe):
    """Optimise a reward by PPO."""

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
    """Choice of preference pairs from scored samples of one prompt."""

    # best_worst = one pair per prompt; all = every pair that differs enough; threshold = every
    # response at or above `threshold` against every one below it
    choose: Literal["best_worst", "all", "threshold"] = "best_worst"
    # score from which a response counts as good, for choose=threshold
    threshold: Annotated[
        float, Range("(-inf, inf)"), Unit("score units"), When("choose", "threshold")
    ] = 0.0
    # margin by which chosen must beat rejected
    min_margin: Annotated[float, Range("[0, inf)"), Unit("score units")] = 0.0


@dataclass(frozen=True, kw_only=True)
class GenerateRecipe(CommonRecipe):
    """Sample responses, score them if there is a reward, and write pairs if there is `pairs`."""

    # further models that answer the same prompts; all samples of a prompt are ranked together
    also: tuple[str, ...] = ()
    # write the best sample of each prompt for sft (rejection-sampling fine-tuning)
    best_of_n: bool = False
    # no effect here: there are no steps
    trackers: tuple[str, ...] = ()
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    # a reward or a list of them, as for PPO; scores every sample
    reward: tuple[RewardTerm, ...] = ()
    # how samples become pairs; null = samples only
    pairs: PairsConfig | None = None
    # budget of one forward pass: sets the memory, changes no result
    tokens_per_microbatch: Annotated[int, Range("[1, 1000000000]"), Unit("tokens")] = 4096


@dataclass(frozen=True, kw_only=True)
class EvalRecipe(ModelRecipe):
    """One table over one or several checkpoints, on held-out prompts."""

    # one checkpoint; or several in `models`
    model: str | None = None
    # name -> folder, hub id, adapter, GGUF file, checkpoint of a run or JSONL of outputs; `ppo#0`
    # and `ppo#1` are seeds of ppo, compared as one
    models: dict[str, str] = field(default_factory=dict)
    # `data.test`, or else `data.train`: prompts, best with references
    data: DataConfig = field(default_factory=DataConfig)
    # KL is measured against it; null = no KL
    reference_model: str | None = None
    # a reward or a list of them, as for PPO; scores every model's outputs
    reward: tuple[RewardTerm, ...] = ()
    # a reward that counts as true, beside the one that was optimised: shows over-optimisation
    gold_reward: tuple[RewardTerm, ...] = ()
    # corpus metrics against the references (align.evaluation.bleu lists them), and module:name of
    # your own: a function as for a reward, or an `evaluate` metric
    metrics: tuple[str, ...] = ("bleu", "chrf", "chrf++", "ter")
    # module:name of f(prompts, a, b, references) -> for each prompt 1 = a is better, 0 = b, 0.5 tie
    judge: str | None = None
    # difference up to which two answers tie in the win rate
    tie_margin: Annotated[float, Range("[0, inf)"), Unit("reward units")] = 0.0
    # adds a model: of n samples of `reference_model` the best by `reward`; null = none
    best_of_n: Annotated[int | None, Range("[2, 100000]"), Unit("samples")] = None
    # as `data`: pairs whose held-out side `reward` is judged on; with equal seed and
    # `test_fraction` the rows that `align rm` held out
    preferences: DataConfig = field(default_factory=DataConfig)
    # the outputs that BLEU, chrF and reward are measured on
    generation: GenerationOptions = field(
        default_factory=lambda: GenerationOptions(temperature=0.0)
    )
    # samples that KL and the sampled chrF are measured on; null = the outputs themselves
    sampling: GenerationOptions | None = None
    # resamplings of every paired test
    num_resamples: Annotated[int, Range("[1, 10000000]")] = 1000
    # keep samples in outputs_cache/ beside the run, by weights, prompts and sampling
    cache_outputs: bool = True
    # budget of one forward pass: sets the memory, changes no result
    tokens_per_microbatch: Annotated[int, Range("[1, 1000000000]"), Unit("tokens")] = 4096


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When `align iterate` ends before its last round; null switches a rule off."""

    # KL to the starting model on held-out prompts
    max_kl: Annotated[float | None, Range("(0, inf)"), Unit("nats per response")] = None
    # rounds without a higher gold score
    patience: Annotated[int | None, Range("[1, inf)"), Unit("rounds")] = None
    # pairs that a round has to yield
    min_pairs: Annotated[int | None, Range("[1, inf)"), Unit("pairs")] = None


@dataclass(frozen=True, kw_only=True)
class IterateRecipe:
    """Rounds of sampling, labelling, reward model, and PPO or online DPO."""

    # folder or hub id of the model before the first round
    model: str
    # holds `rounds/1`, `rounds/2`, ..., each with a folder for every stage
    output_dir: str
    # base of an adapter that `model` names, instead of the one that it names itself
    base_model: str | None = None
    # rounds at most; `stop` may end earlier
    rounds: Annotated[int, Range("[1, 100000]"), Unit("rounds")] = 3
    # recipes (files or shipped names) of a round's stages; `generate`'s reward labels the pairs and
    # is the gold score; model, data of pairs, and folders are set here
    generate: str
    # trained on the pairs of all rounds so far; null with `dpo` trains none
    rm: str | None = None
    # PPO recipe; set this one or `dpo`
    ppo: str | None = None
    # recipe of online DPO, on the round's own pairs
    dpo: str | None = None
    # measures each round, on held-out prompts, with `generate`'s reward and KL to the first model
    eval: str
    # `stage.key=value` over those recipes, such as generate.generation.slots=64
    set: tuple[str, ...] = ()
    # what KL is charged to: the model before the first round, the round's own start, or an average
    reference: Literal["fixed", "refresh", "average"] = "fixed"
    # share of the old average that each round keeps
    reference_decay: Annotated[float, Range("[0, 1]"), When("reference", "average")] = 0.5
    # rules that end the rounds early
    stop: StopRules = field(default_factory=StopRules)
    # each round adds its number to it
    seed: Annotated[int, Range("[0, 4294900000]")] = 0
    # never refuses a folder that holds a run; auto resumes where it was interrupted
    resume: Literal["never", "auto"] = "never"
    # replace the run that the folder holds, its rounds included
    overwrite: bool = False
