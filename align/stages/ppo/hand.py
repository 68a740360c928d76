"""State of a PPO iteration: enough to leave at any phase and to go on there, exactly.

The rollout with its scores, what was computed of it before the weights moved, and how many
minibatches were trained on. Prompts are not in here: they are a function of the seed and the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from align.stages.ppo.metrics import Clock
from align.training.checkpoint import InHand
from align.types import Experience, PromptExample, Rollout

ROLLOUT = tuple(f.name for f in fields(Rollout) if f.name != "prompt_ids")
EXPERIENCE = tuple(f.name for f in fields(Experience) if f.name != "rollout")


@dataclass
class Hand:
    """One iteration; each field is None until its phase is over.

    Attributes:
        scores: ``[B]`` as the reward gave them.
        minibatches: Optimizer steps done on the experience.
        sums: What those steps measured, summed.
    """

    rollout: Rollout | None = None
    scores: Tensor | None = None
    experience: Experience | None = None
    minibatches: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def packed(self) -> InHand:
        """As tensors and JSON values, for a checkpoint."""
        held = {name: getattr(self.rollout, name, None) for name in ROLLOUT}
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        if self.scores is not None:
            tensors["raw_scores"] = self.scores
        if self.experience is not None:
            tensors |= {f"experience.{n}": getattr(self.experience, n) for n in EXPERIENCE}
        return tensors, {"minibatches": self.minibatches, "sums": self.sums}

    @classmethod
    def unpacked(
        cls, in_hand: InHand | None, prompt_ids: Sequence[np.ndarray], device: torch.device
    ) -> Hand:
        """Inverse of `packed`; ``prompt_ids`` has one array for each response."""
        if in_hand is None:
            return cls()
        tensors, state = {k: v.to(device) for k, v in in_hand[0].items()}, in_hand[1]
        held = {name: tensors[name] for name in ROLLOUT if name in tensors}
        rollout = Rollout(tuple(prompt_ids), **held)
        made = {n: tensors.get(f"experience.{n}") for n in EXPERIENCE}
        experience = None if None in made.values() else Experience(rollout, **made)  # type: ignore[arg-type]
        return cls(
            rollout, tensors.get("raw_scores"), experience, state["minibatches"], state["sums"]
        )


@dataclass
class Iteration:
    """One turn of PPO: its prompts, and what is in hand of it.

    Attributes:
        number: From 0; ``step``, which users read, is from 1.
        members: Numbers of its prompts.
        examples: The same prompts.
    """

    number: int
    members: Sequence[int]
    examples: Sequence[PromptExample]
    hand: Hand
    clock: Clock = field(default_factory=Clock)

    @property
    def step(self) -> int:
        return self.number + 1
