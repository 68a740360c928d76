"""Activations that wait in the CPU's memory for their turn in the backward pass.

Every tensor that autograd saves inside of `kept_on_cpu` is copied there, and back when it is asked
for: in the stream that computes, so that nothing has to be waited for, into page-locked memory.
Left where they are: what is small, what is expanded (a copy would be larger than the tensor),
whatever shares its memory with a parameter, since a copy of that would free nothing, and autocast's
copies of parameters, known by their shape, which would have to be moved for every microbatch. With
gradient checkpointing a block saves what came into it alone, and that is what is copied. A tensor
that several operations save is copied for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from align.types import AlignError

LEAST_BYTES = 2**20
"""Smaller tensors stay: a copy of them costs more time than it saves memory."""


def require_gpu(device: torch.device) -> None:
    """Refuse where there is no other memory to go to."""
    if device.type != "cuda":
        raise AlignError(
            f"activation_offload: has no effect on a {device.type}, whose memory activations are "
            "in already; remove it (gradient_checkpointing=true saves memory here too)"
        )


def kept_on_cpu(model: nn.Module) -> saved_tensors_hooks:
    """A context for the forward pass of ``model``; the backward pass may run outside of it."""
    # what is saved of a parameter is a view of it, not the parameter itself
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
