"""Sections of a recipe that other rooms read too: they are defined here, once.

``config`` puts them into recipes; models, rollout and training take them as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters by peft; the model in ``model/`` is saved merged, the adapter beside it."""

    # rank
    r: int = 16
    # updates are scaled by alpha / r
    alpha: float = 32.0
    # probability, on the adapters' input
    dropout: float = 0.0
    # module names, or all-linear
    target_modules: tuple[str, ...] = ("all-linear",)
    # adapt the topmost layers only (the backward pass stops below them); null adapts every layer
    top_layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """The vLLM engine of a process, for ``engine=vllm``."""

    # share of the GPU's memory (of main memory without a GPU) for its copy of the weights and its
    # cache, beside what training holds
    gpu_memory_utilization: float = 0.3
    # tokens that a prompt and its response may have
    max_tokens: int = 2048
    # neither compile nor capture CUDA graphs: starts sooner, samples slower
    eager: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How responses are sampled."""

    # tokens a response may have at most, its end token included
    max_new_tokens: int = 128
    # logits are divided by it; 0 = greedy
    temperature: float = 1.0
    # share of probability mass kept, 1 = all (PPO allows 1 only)
    top_p: float = 1.0
    # responses for each prompt
    samples_per_prompt: int = 1
    # sequences decoded side by side
    slots: int = 64
    # what samples: align's own sampler, or vLLM in the same process (pip install
    # 'align-rlhf[vllm]'); log-probs are the policy's own with either
    engine: Literal["align", "vllm"] = "align"
    vllm: VLLMOptions = field(default_factory=VLLMOptions)


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW and its schedule."""

    lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # share of all optimizer steps over which lr rises from 0
    warmup_fraction: float = 0.05
    # lr at the end as a share of the peak
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # global gradient norm, applied once before every optimizer step
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The part of `train` that every training stage has: memory, evaluations, checkpoints."""

    # tokens of one forward and backward on one device: sets the memory, changes no result
    tokens_per_microbatch: int = 4096
    # optimizer steps (PPO: iterations) between held-out evaluations; 0 = at the start and the end
    eval_every: int = 0
    # optimizer steps (PPO: iterations) between checkpoints; 0 = none, the model is saved at the end
    save_every: int = 0
    # newest checkpoints that are kept
    keep_checkpoints: int = 2
    # on NaN or infinity (in logits, scores, values, losses or gradients): stop the run, or skip the
    # optimizer step (PPO: the minibatch, or the whole rollout) and count it
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions):
    """How often the optimizer steps, on how much, and what is written when."""

    # passes over the data
    epochs: float = 1.0
    # optimizer steps; null = as many as `epochs` says
    max_steps: int | None = None
    # sequences (SFT) or pairs (RM, DPO) per optimizer step, over all processes
    minibatch: int = 16
    # weight of a mixture of experts' load-balancing loss, beside the stage's own; 0 = off (models'
    # configs name theirs router_aux_loss_coef: 0.001 to 0.02)
    router_aux_coef: float = 0.0
    # optimizer steps between lines of metrics.jsonl
    log_every: int = 1
    # held-out number that chooses the best checkpoint, which is kept and saved as `model/` at the
    # end; null saves the last
    keep_best: Literal["loss", "accuracy"] | None = None


@dataclass(frozen=True, kw_only=True)
class PPOTrainOptions(LoopOptions):
    """The section `train` of PPO, whose steps are the section `ppo`'s iterations."""

    # held-out number that chooses the best checkpoint, which is kept and saved as `model/` at the
    # end; null saves the last
    keep_best: Literal["score"] | None = None
