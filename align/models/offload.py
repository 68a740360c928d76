"""Keep activations in the CPU's memory until the backward pass needs them.

Every tensor that autograd saves inside `kept_on_cpu` is copied to page-locked memory, and back on
use, in the compute stream, so that nothing waits. Not moved:

- small tensors, and expanded ones, whose copy would be larger;
- tensors that share memory with a parameter, since copying them frees nothing;
- autocast's copies of parameters, known by their shape: they would move for every microbatch.

With gradient checkpointing a block saves its input alone, and that is copied. A tensor that several
operations save is copied for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from align.types import AlignError

LEAST_BYTES = 2**20
"""Size below which a tensor is not moved: the copy costs more time than it saves memory."""


def require_gpu(device: torch.device) -> None:
    """Refuse offloading on a device that has no other memory to move activations to."""
    if device.type != "cuda":
        raise AlignError(
            f"activation_offload: has no effect on a {device.type}, whose memory activations are "
            "in already; remove it (gradient_checkpointing=true saves memory here too)"
        )


def kept_on_cpu(model: nn.Module) -> saved_tensors_hooks:
    """Make the context for the forward pass of ``model``; the backward pass may run outside."""
    # autograd saves views of a parameter, so compare storages
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    shapes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        small = tensor.numel() * tensor.element_size() < LEAST_BYTES
        storage = tensor.untyped_storage()
        expanded = tensor.numel() * tensor.element_size() > storage.nbytes()
        if small or expanded or storage.data_ptr() in weights or tensor.shape in shapes:
            return tensor
        pinned = tensor.device.type == "cuda"
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return kept.copy_(tensor, non_blocking=pinned), tensor.device

    def unpack(kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor, device = kept
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
