from __future__ import annotations

import torch
from torch import Tensor

from align.rollout.cache import SlotCache, recording_cache

PROMPTS = [[0, 1, 2], [3, 4]]


def prefill(first: float) -> object:
    """One layer, one head of size 1: the key of packed column c is ``first + c``."""
    cache = recording_cache()
    keys = (first + torch.arange(5.0)).view(1, 1, 5, 1)
    cache.update(keys, -keys, 0)
    return cache


def step(cache: SlotCache, key: float) -> tuple[Tensor, Tensor]:
    """Write one column into every slot; what each slot may look at, and the columns."""
    mask = cache.next_step().mask
    new = torch.full((2, 1, 1, 1), key)
    keys, values = cache.update(new, -new, 0)
    assert torch.equal(keys, -values)
    return mask, keys[:, 0, :, 0]


def visible(cache: SlotCache, key: float) -> list[list[float]]:
    mask, keys = step(cache, key)
    return [row[seen].tolist() for row, seen in zip(keys, mask, strict=True)]


def filled() -> SlotCache:
    cache = SlotCache(2, prefill(10.0), 3)
    cache.fill([0, 1], prefill(10.0), PROMPTS)
    return cache


def test_each_slot_sees_its_prompt_and_what_it_wrote() -> None:
    cache = filled()
    assert visible(cache, 1.0) == [[10, 11, 12, 1], [13, 14, 1]]
    assert visible(cache, 2.0) == [[10, 11, 12, 1, 2], [13, 14, 1, 2]]


def test_a_slot_is_refilled_beside_one_that_goes_on() -> None:
    cache = filled()
    step(cache, 1.0)
    cache.fill([1], prefill(20.0), PROMPTS[:1])
    assert visible(cache, 2.0) == [[10, 11, 12, 1, 2], [20, 21, 22, 2]]


def test_a_longer_prompt_moves_the_others() -> None:
    cache = filled()
    cache.keep(torch.tensor([1, 1]))  # two columns are left: a prompt of three has no room
    assert cache.length == 2
    cache.fill([0], prefill(20.0), PROMPTS[:1])
    assert visible(cache, 1.0) == [[20, 21, 22, 1], [13, 14, 1]]


def test_columns_that_nobody_needs_are_forgotten() -> None:
    cache = filled()
    for number in range(50):
        step(cache, float(number))
    for slot in (0, 1):
        cache.fill([slot], prefill(20.0), PROMPTS[:1])
    for number in range(50):
        last = visible(cache, 100.0 + number)
    assert cache.length == 3 + 50
    assert last == [[20, 21, 22, *(100.0 + n for n in range(50))]] * 2


def test_a_released_slot_counts_no_positions() -> None:
    """Its position stays within what the model has, however long its neighbours go on."""
    cache = filled()
    step(cache, 1.0)
    cache.release(0)
    assert visible(cache, 2.0) == [[2], [13, 14, 1, 2]]
    assert (cache.length - cache.starts).tolist() == [1, 4]
