"""Shared base of PPO's four roles with LoRA: frozen weights held once, one adapter per role.

Every role is a module tree of its own over the same tensors. Full fine-tuning shares nothing: each
trained role then has weights of its own.
"""

from __future__ import annotations

from align.config.sections import LoraOptions
from align.models import Policy, ScalarModel, scalar_model_on
from align.models.load import weights_hash
from align.models.lora import adapter_beside


class SharedBase:
    """The actor's frozen weights, and the roles that share them.

    A reward model or a critic shares them if the adapter that `align rm` or `align ppo` saved
    beside it was trained on weights with the same hash, whatever their name. A critic that starts
    from a reward model with weights of its own shares those.

    Attributes:
        roles: Roles on the actor's weights.
        apart: Reward models with weights of their own, by folder or hub id; the caller adds them.
    """

    def __init__(self, actor: Policy) -> None:
        self.actor = actor
        self.roles = ["actor"]
        self.apart: dict[str, ScalarModel] = {}
        self._sha256 = weights_hash(actor.backbone)
        self._lines: list[str] = []

    def reward_model(self, model: str) -> ScalarModel | None:
        """Build the frozen reward model; None if it has to be loaded with weights of its own."""
        return self._share("reward", model, frozen=True)

    def critic(
        self, start: str, *, lora: LoraOptions, gradient_checkpointing: bool
    ) -> ScalarModel | None:
        """Build the critic; None if it has to be loaded with weights of its own.

        Args:
            start: Model that it starts from; a saved adapter continues training, with its head.
            lora: Options of a new adapter, if there is none to continue.
        """
        if start in self.apart:
            self._lines.append(f"critic: on the weights of {start}, which are held once")
            return scalar_model_on(
                self.apart[start],
                name=start,
                lora=lora,
                gradient_checkpointing=gradient_checkpointing,
            )
        new = lora if start == self.actor.name else None
        return self._share("critic", start, new=new, gradient_checkpointing=gradient_checkpointing)

    def lines(self) -> list[str]:
        """List who shares and who does not, and why, for the log."""
        return [f"shared base weights: {', '.join(self.roles)}", *self._lines]

    def _share(
        self,
        role: str,
        model: str,
        *,
        new: LoraOptions | None = None,
        gradient_checkpointing: bool = False,
        frozen: bool = False,
    ) -> ScalarModel | None:
        found = None if new else adapter_beside(model)
        made = None
        if not new and found is None:
            why = "no adapter with a score head is kept beside it"
        elif found is not None and found[1] != self._sha256:
            why = "its adapter is on other weights"
        else:
            why = f"transformers has no one-label model on {type(self.actor.backbone).__name__}"
            made = scalar_model_on(
                self.actor,
                name=model,
                lora=new,
                adapter=found[0] if found else None,
                gradient_checkpointing=gradient_checkpointing,
                frozen=frozen,
            )
        if made is None:
            self._lines.append(f"{role}: {model} has weights of its own, because {why}")
        else:
            self.roles.append(role)
        return made
