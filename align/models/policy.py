"""Language models and scalar models over packed rows.

Actor and reference are a `Policy`; critic and reward model are a `ScalarModel`. Both take a
`TokenBatch`, run the backbone once over packed rows, and return flat float32 tensors for the
counted tokens (row-major) or the sequences, without ``[B, T, V]`` logits and without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.base.folders import whole_folder
from align.losses.logprobs import TokenStatistics, token_logprobs, token_statistics
from align.models.attention.packed import BACKENDS
from align.models.dropout import keep_pinned
from align.models.load import weights_hash
from align.models.lora import merged, save_adapter, unwrapped
from align.models.offload import kept_on_cpu
from align.models.precision import autocast
from align.types import AlignError, TokenBatch


class Packed(nn.Module):
    """A transformers model whose backbone runs over packed rows.

    ``activation_offload`` moves saved activations to the CPU's memory (`offload`).
    ``collects_router_logits`` keeps a mixture's router logits for its loss (`router`).
    """

    activation_offload = False
    collects_router_logits = False
    router_logits: tuple[Tensor, ...] | None = None

    def __init__(self, model: nn.Module, *, precision: str, name: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.name = name

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        keep_pinned(self)
        return self

    @property
    def inner(self) -> Any:
        """The transformers model without peft's wrapper."""
        return unwrapped(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def attention(self) -> str:
        """Attention backend, one of `attention.BACKENDS`."""
        name = self.inner.config._attn_implementation
        return next(backend for backend, known in BACKENDS.items() if known == name)

    @attention.setter
    def attention(self, backend: str) -> None:
        self.inner.set_attn_implementation(BACKENDS[backend])
        if self.attention != backend:  # transformers only warns
            raise RuntimeError(f"{self.name} does not let its attention be changed to {backend}")

    @property
    def backbone(self) -> Any:
        # Llama 4's prefix names the multimodal model around it
        return getattr(self.inner, self.inner.base_model_prefix, None) or self.inner.model

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """Compute the final hidden states ``[B,T,H]``, after the last norm."""
        offload = self.activation_offload and torch.is_grad_enabled()
        saving = kept_on_cpu(self.backbone) if offload else nullcontext()
        more = {"output_router_logits": True} if self.collects_router_logits else {}
        with autocast(self.precision, self.device), saving:
            out = self.backbone(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                segments=batch.segments,
                **more,
            )
        if self.collects_router_logits:
            self.router_logits = out.router_logits
        return out.last_hidden_state

    def enable_gradient_checkpointing(self) -> None:
        """Enable checkpointing; like transformers', it acts in training mode only."""
        self.inner.gradient_checkpointing_enable({"use_reentrant": False})

    def save(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Sequence[int] = (),
        extra_files: Mapping[str, str] | None = None,
    ) -> None:
        """Save weights as safetensors, with tokenizer and chat template; LoRA is merged.

        The adapter is saved beside the merged model, in ``<folder>_adapter``. The folder is
        complete or absent after a crash.
        """
        if end_ids:  # plain `generate` then stops at the tokens that training taught
            self.inner.generation_config.eos_token_id = list(end_ids)
        folder = Path(folder)
        model: Any = self.model
        if model is not self.inner:
            adapter = folder.with_name(f"{folder.name}_adapter")
            save_adapter(model, adapter, backbone_sha256=weights_hash(self.backbone))
            model = merged(model)
        with whole_folder(folder, needs=sum(p.nbytes for p in model.parameters())) as partial:
            model.save_pretrained(str(partial))
            tokenizer.save_pretrained(str(partial))
            for name, text in (extra_files or {}).items():
                (partial / name).write_text(text, encoding="utf-8")


class Policy(Packed):
    """A causal language model that returns log-probabilities of given tokens.

    ``logit_scale`` is the architecture's factor on its logits (Granite, Cohere).
    """

    logit_scale = 1.0

    def forward(
        self, batch: TokenBatch, *, temperature: float = 1.0, statistics: bool = False
    ) -> TokenStatistics:
        """Compute log-probabilities of the counted tokens, row-major, float32 nats.

        Logits are divided by ``temperature``, as in sampling. Entropy and collision cost one more
        pass over the logits and are 0 unless ``statistics``.
        """
        hidden = self.hidden_states(batch)
        predicting = hidden.reshape(-1, hidden.shape[-1])[_flat(batch, batch.predictor)]
        targets = batch.input_ids[batch.loss_mask]
        with autocast(self.precision, self.device):
            weight, options = self.head_weight(), self._head()
            options["temperature"] = temperature
            if self.logit_scale != 1.0:  # (scale z) / t = z / (t / scale), in a cap's tanh as well
                options["temperature"] = temperature / self.logit_scale
                if options["softcap"] is not None:
                    options["softcap"] /= self.logit_scale
            if statistics:
                return token_statistics(predicting, weight, targets, **options)
            logprobs = token_logprobs(predicting, weight, targets, **options)
        nothing = torch.zeros_like(logprobs)
        return TokenStatistics(logprobs, nothing, nothing)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute float32 logits ``[N,V]`` of a few hidden states, for sampling only."""
        options = self._head()
        with autocast(self.precision, self.device):
            logits = nn.functional.linear(hidden, self.head_weight()).float()
        if options["bias"] is not None:
            logits = logits + options["bias"]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        return logits

    def head_weight(self) -> Tensor:
        """Return the output embedding ``[V,H]``, with its LoRA update if the head has one."""
        head = self.inner.get_output_embeddings()
        if not hasattr(head, "lora_A") or head.disable_adapters:
            return head.weight
        updates = [head.get_delta_weight(name) for name in head.active_adapters]
        return head.base_layer.weight + sum(updates)

    def _head(self) -> dict[str, Any]:
        head = self.inner.get_output_embeddings()
        bias = getattr(getattr(head, "base_layer", head), "bias", None)
        config = self.inner.config.get_text_config()
        return {"bias": bias, "softcap": getattr(config, "final_logit_softcapping", None)}


class ScalarModel(Packed):
    """A reward model (read at each sequence's last token) or a critic (read before each token).

    ``fresh_head`` is True if the checkpoint had no head: scores are noise until it is trained.
    """

    fresh_head = False

    def forward(self, batch: TokenBatch, *, at: Literal["last", "counted"]) -> Tensor:
        """Compute float32 scores ``[sequences]``, in the batch's order, or values ``[N]``.

        ``last``: the score of each sequence at its last token. ``counted``: the value of the state
        in which each counted token was chosen, read at that token's predictor.
        """
        hidden = self.hidden_states(batch)
        if at == "last":
            columns = [s.row * batch.input_ids.shape[1] + s.stop - 1 for s in batch.sequences]
            index = torch.tensor(columns, device=hidden.device)
        else:
            index = _flat(batch, batch.predictor)
        rows = hidden.reshape(-1, hidden.shape[-1])[index]
        with torch.autocast(self.device.type, enabled=False):
            return self.inner.score(rows.float()).squeeze(-1)

    def scale_head(self, gain: float) -> None:
        """Multiply every later score by ``gain``, exactly, by scaling the head."""
        parameters = list(self.inner.score.parameters())
        # under LoRA the trained copy of the head computes the score, not the frozen original
        with torch.no_grad():
            for parameter in [p for p in parameters if p.requires_grad] or parameters:
                parameter.mul_(gain)


def _flat(batch: TokenBatch, columns: Tensor) -> Tensor:
    """Return the index into ``[B*T]`` of ``columns`` at the counted tokens, row-major."""
    rows, times = batch.loss_mask.nonzero(as_tuple=True)
    return rows * batch.input_ids.shape[1] + columns[rows, times]


def check_length(model: Packed, longest: int, what: str) -> None:
    """Refuse sequences longer than the model's positions."""
    config = model.inner.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    cure = "lower data.max_tokens or generation.max_new_tokens"
    if limit is not None and longest > limit:
        raise AlignError(f"{model.name} has {limit} positions, but {what} {longest} tokens; {cure}")
    switch = _rope_switches_at(config)
    if switch is not None and longest > switch:
        raise AlignError(
            f"{model.name} rotates all positions of a sequence otherwise once it has more than "
            f"{switch} tokens (longrope), which is not done in packed rows, and {what} {longest}; "
            f"{cure}"
        )


def _rope_switches_at(config: Any) -> int | None:
    """Return the length above which longrope uses other frequencies for the whole sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    found = [k.get("original_max_position_embeddings") for k in kinds if "longrope" in k.values()]
    return min((int(length) for length in found if length), default=None)


def batch_sequences(batch: TokenBatch) -> np.ndarray:
    """Return each sequence's number in the caller's order, as ``at="last"`` scores them."""
    return np.array([s.sequence for s in batch.sequences], dtype=np.int64)
