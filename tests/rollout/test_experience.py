from __future__ import annotations

import numpy as np
import pytest
import torch

from align.data.tokens.packing import counted_coordinates
from align.rollout.experience import (
    estimate_advantages,
    over_rollout,
    rollout_groups,
    shaped_rewards,
)
from align.types import Experience, Rollout, TokenBatch

# two samples of one prompt, of three tokens and of one; 9s lie where nothing counts
MASK = torch.tensor([[True, True, True], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -0.5, -0.2], [-0.4, 0.0, 0.0]])
REF_LOGPROBS = torch.tensor([[-1.2, -0.9, -0.1], [-0.6, 0.0, 0.0]])
VALUES = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.0, 0.0]])
SCORES = torch.tensor([1.0, -2.0])


def rollout() -> Rollout:
    prompt = np.array([1, 2], np.int32)
    return Rollout(
        prompt_ids=(prompt, prompt),
        input_ids=torch.tensor([[11, 12, 13], [21, 0, 0]]),
        response_mask=MASK,
        logprobs=LOGPROBS,
        finished=torch.tensor([True, False]),
    )


def experience(
    *,
    kl_coef: float = 0.05,
    kl_kind: str = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool = False,
) -> Experience:
    rewards = shaped_rewards(
        rollout(), SCORES, REF_LOGPROBS, kl_coef=kl_coef, kl_kind=kl_kind, whiten=whiten_rewards
    )
    advantages, returns = estimate_advantages(
        rewards, VALUES, MASK, gamma=1.0, gae_lambda=0.95, whiten=whiten_advantages
    )
    return Experience(rollout(), REF_LOGPROBS, VALUES, rewards, advantages, returns, SCORES)


def flat(x: torch.Tensor) -> list[float]:
    return x.flatten().tolist()


def test_golden_values() -> None:
    # kl .2, .4, -.1 | .2:  rewards -.01, -.02, .005 + 1 | -.01 - 2
    # deltas -.01 + .2 - .1 = .09, -.02 + .3 - .2 = .08, 1.005 - .3 = .705 | -2.01 - .5 = -2.51
    # A2 = .705, A1 = .08 + .95 * .705 = .74975, A0 = .09 + .95 * .74975 = .8022625
    found = experience()
    assert flat(found.rewards) == pytest.approx([-0.01, -0.02, 1.005, -2.01, 0, 0], abs=1e-6)
    want = [0.8022625, 0.74975, 0.705, -2.51, 0, 0]
    assert flat(found.advantages) == pytest.approx(want, abs=1e-6)
    want = [0.9022625, 0.94975, 1.005, -2.01, 0, 0]
    assert flat(found.returns) == pytest.approx(want, abs=1e-6)


def test_whitening_advantages_leaves_the_returns() -> None:
    found, plain = experience(whiten_advantages=True), experience()
    assert torch.equal(found.returns, plain.returns)
    counted = found.advantages[MASK]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not found.advantages[~MASK].any()


def test_whitening_rewards_keeps_their_mean() -> None:
    found, plain = experience(whiten_rewards=True), experience()
    assert found.rewards[MASK].mean().item() == pytest.approx(plain.rewards[MASK].mean().item())
    assert found.rewards[MASK].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not found.rewards[~MASK].any()
    assert not torch.allclose(found.returns, plain.returns)


def test_no_kl_where_it_is_a_loss_term() -> None:
    assert flat(experience(kl_coef=0.0).rewards) == [0, 0, 1, -2, 0, 0]


def test_k2_and_k3_in_the_reward() -> None:
    # k2: .5 * (.04, .16, .01 | .04);  k3: e^-.2 - 1 + .2 = .018731, e^-.4 - 1 + .4 = .070320,
    # e^.1 - 1 - .1 = .005171 | .018731; times -.05
    found = flat(experience(kl_kind="k2").rewards)
    assert found == pytest.approx([-0.001, -0.004, 0.99975, -2.001, 0, 0], abs=1e-6)
    found = flat(experience(kl_kind="k3").rewards)
    want = [-0.00093655, -0.003516, 0.99974145, -2.00093655, 0, 0]
    assert found == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("budget", [1, 6, 100])
def test_over_rollout_puts_every_number_in_its_place(budget: int) -> None:
    prompts = [np.array([1], np.int32), np.array([2, 3, 4], np.int32), np.array([5], np.int32)]
    lengths = torch.tensor([4, 1, 2, 3, 3, 1])
    mask = torch.arange(4)[None] < lengths[:, None]
    source = Rollout(
        prompt_ids=tuple(p for p in prompts for _ in range(2)),
        input_ids=torch.arange(1, 25).view(6, 4) * mask,
        response_mask=mask,
        logprobs=torch.zeros(6, 4),
        finished=torch.ones(6, dtype=torch.bool),
    )
    batches: list[TokenBatch] = []

    def token_ids(batch: TokenBatch) -> torch.Tensor:
        batches.append(batch)
        assert len(counted_coordinates(batch)[0]) == int(batch.loss_mask.sum())
        return batch.input_ids[batch.loss_mask]

    groups = rollout_groups(source, 2)
    assert [g.prefix_ids.tolist() for g in groups] == [[1], [2, 3, 4], [5]]
    found = over_rollout(groups, token_ids, like=source.logprobs, tokens_per_microbatch=budget)
    assert torch.equal(found, source.input_ids.float())
    assert (len(batches) > 1) == (budget < 19)  # 14 response tokens and 5 of prompts
