from __future__ import annotations

import pytest
import torch

from align.losses import nll_loss


def test_sum_over_tokens_divided_by_the_global_count() -> None:
    # (.5 + 1.5) / 4: two of the four counted tokens lie in another microbatch
    assert nll_loss(torch.tensor([-0.5, -1.5]), denominator=4).item() == 0.5


def test_microbatches_of_unequal_length_add_up() -> None:
    logprobs = -torch.rand(7)
    parts = [nll_loss(part, denominator=7) for part in logprobs.split([1, 4, 2])]
    assert sum(parts).item() == pytest.approx(-logprobs.mean().item(), rel=1e-6)
    means = [-part.mean().item() for part in logprobs.split([1, 4, 2])]
    assert sum(means) / 3 != pytest.approx(-logprobs.mean().item(), rel=1e-4)


def test_empty_microbatch_adds_nothing() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = nll_loss(empty, denominator=3)
    loss.backward()
    assert loss.item() == 0


def test_no_counted_token_anywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="no counted token"):
        nll_loss(torch.zeros(0), denominator=0)
