from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.limit import linear_shapes, seconds_of

TINY = Path(__file__).parents[2] / "models" / "tiny"


def test_every_linear_layer_is_counted_once() -> None:
    body, head = linear_shapes(str(TINY))
    # five layers: q, k, v, o of 4 x 64; gate and up; down. The head is tied to 4,096 embeddings.
    assert body == {(256, 256): 20, (256, 704): 10, (704, 256): 5}
    assert head[0] == 256


def test_a_reference_forward_is_one_product_more(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append((a.shape, b.shape)))
    seconds_of(7, 3, 5, passes=4, dtype=torch.float32)
    forward, grad_x, grad_weight = ((7, 3), (3, 5)), ((7, 5), (5, 3)), ((5, 7), (7, 3))
    assert products[:4] == [forward, forward, grad_x, grad_weight]
