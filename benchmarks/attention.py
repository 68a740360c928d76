"""Attention by matrix products beside torch's fused kernel: ``python -m benchmarks.attention``.

Forward and backward of causal segments, SmolLM2's heads (9 queries' and 3 keys' of 64 numbers), in
the dtype that `align` multiplies in here and in float32. Both sides in turn; the median of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F

from align.models.attention import cpu as products
from align.models.precision import has_fast_bf16

HEADS, KV_HEADS, SIZE = 9, 3, 64
SHAPES = ((8, 64), (3, 182), (1, 395), (1, 512), (1, 1024), (1, 2048))
ROUNDS = 15


def both(segments: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of the fused kernel and of the products."""
    query, grad = (torch.randn(segments, HEADS, length, SIZE).to(dtype) for _ in range(2))
    key, value = (torch.randn(segments, KV_HEADS, length, SIZE).to(dtype) for _ in range(2))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    grouped = (segments * KV_HEADS, HEADS // KV_HEADS, length, SIZE)

    def fused() -> torch.Tensor:
        k, v = (t.flatten(0, 1)[:, None].expand(grouped) for t in (key, value))
        out = F.scaled_dot_product_attention(query.reshape(grouped), k, v, is_causal=True)
        return out.view_as(query)

    def by_products() -> torch.Tensor:
        return products.attend(query, key, value, None, SIZE**-0.5, before=0)

    times: dict[Callable[[], torch.Tensor], list[float]] = {fused: [], by_products: []}
    for _ in range(ROUNDS):
        for side, taken in times.items():
            started = time.perf_counter()
            torch.autograd.grad(side(), inputs, grad)
            taken.append(1e3 * (time.perf_counter() - started))
    return median(times[fused]), median(times[by_products])


def main() -> None:
    fast = [torch.bfloat16] if has_fast_bf16(torch.device("cpu")) else []
    print("| dtype | segments | length | fused, ms | products, ms | fused / products |")
    print("|---|---|---|---|---|---|")
    for dtype in (*fast, torch.float32):
        for segments, length in SHAPES:
            fused, ours = both(segments, length, dtype)
            name = str(dtype).removeprefix("torch.")
            ratio = fused / ours
            print(f"| {name} | {segments} | {length} | {fused:.2f} | {ours:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
