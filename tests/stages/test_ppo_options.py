"""Every option of PPO acts through the stage, not only in the function that it is meant for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from align.stages.ppo import run as ppo
from align.types import Experience

Row = dict[str, Any]
ReadJsonl = Callable[[Path], list[Row]]
RunPPO = Callable[..., Path]
Experiences = list[tuple[Row, Experience]]


def steps(folder: Path, read_jsonl: ReadJsonl) -> list[Row]:
    return [r for r in read_jsonl(folder / "metrics.jsonl") if "policy_loss" in r]


def test_the_adaptive_coefficient_follows_the_kl_of_a_response(
    run_ppo: RunPPO, read_jsonl: ReadJsonl
) -> None:
    """Not that of a token, which is several times smaller: every target would look far off."""
    options = ("kl.adaptive=true", "kl.horizon=64", "kl.coef=0.1", "optim.lr=0.01")
    # the first KL is 0 whatever the target, so the second is the same in both runs
    second = steps(run_ppo("far", *options, "kl.target=1000"), read_jsonl)[1]["kl"]
    found = steps(run_ppo("near", *options, f"kl.target={second / 1.1}"), read_jsonl)
    assert found[1]["kl"] == pytest.approx(second)
    assert found[1]["kl"] > 2 * found[1]["kl_per_token"]
    # a tenth too high, 16 sequences of 64: 1 + .1 * 16 / 64
    assert found[2]["kl_coef"] == pytest.approx(found[1]["kl_coef"] * 1.025)


def test_the_critics_head_is_in_the_unit_of_what_is_paid(
    run_ppo: RunPPO, reward_folder: Path
) -> None:
    """A reward that counts double is forecast by a head that is twice as large."""
    folder = run_ppo(
        "run",
        f"reward=[{{model: {reward_folder}, weight: 2.0}}]",
        "critic.lr=1e-30",
        "ppo.iterations=1",
    )
    want = load_file(reward_folder / "model.safetensors")["score.weight"]
    found = load_file(folder / "critic" / "model.safetensors")["score.weight"]
    assert found.tolist() == (2 * want).tolist()


def test_every_epoch_cuts_the_rollout_into_other_minibatches(
    run_ppo: RunPPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    original = ppo.FiniteGuard.accepts

    def spying(self: Any, step: int, numbers: Any, ids: Any, **options: Any) -> bool:
        if "policy_loss" in numbers:
            asked.append(tuple(ids))
        return original(self, step, numbers, ids, **options)

    monkeypatch.setattr(ppo.FiniteGuard, "accepts", spying)
    run_ppo("run", "ppo.epochs=3", "ppo.num_minibatches=4", "ppo.iterations=1")
    epochs = [asked[start : start + 4] for start in (0, 4, 8)]
    for epoch in epochs:
        assert [len(ids) for ids in epoch] == [2] * 4
        assert len({id for ids in epoch for id in ids}) == 8  # each prompt once
    cuts = {frozenset(map(frozenset, epoch)) for epoch in epochs}
    assert len(cuts) == 3


def test_the_held_out_kl_has_the_sign_of_kl(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, tiny: Path
) -> None:
    """Against the untrained model: samples of the trained one are far likelier under itself."""
    folder = run_ppo("run", f"reference_model={tiny}", "ppo.iterations=1")
    (trained,) = steps(folder, read_jsonl)
    held_out = [r["eval_kl"] for r in read_jsonl(folder / "metrics.jsonl") if "eval_kl" in r]
    assert trained["kl"] > 2
    # the same two models on other prompts
    assert held_out[0] == pytest.approx(trained["kl"], rel=0.5)


def test_the_optimality_gap_is_of_what_is_paid(run_ppo: RunPPO, read_jsonl: ReadJsonl) -> None:
    """Half the spread of paid - kl_coef * kl over two samples: |a - b| / sqrt(2)."""
    folder = run_ppo("run", "ppo.missing_eos_score=-3", "generation.max_new_tokens=5")
    samples = read_jsonl(folder / "samples.jsonl")
    assert 0 < sum(s["finished"] for s in samples) < len(samples)
    for number, row in enumerate(steps(folder, read_jsonl), start=1):
        mine = [s for s in samples if s["iteration"] == number]
        soft = [(s["score"] if s["finished"] else -3.0) - 0.05 * s["kl"] for s in mine]
        want = np.mean([abs(a - b) / 2**0.5 for a, b in zip(soft[::2], soft[1::2], strict=True)])
        assert row["optimality_gap"] == pytest.approx(want, abs=1e-4)


def test_the_critic_may_not_move_further_than_value_clip_range(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, experiences: Experiences
) -> None:
    """It starts at 0: held there within 1e-6, its loss is half the mean squared return."""
    options = ("ppo.iterations=1", "ppo.epochs=4", "optim.lr=1e-30", "critic.lr=0.01")
    losses = {}
    for clip in ("1e-6", "0"):
        experiences.clear()
        folder = run_ppo(f"clip_{clip}", *options, f"ppo.value_clip_range={clip}")
        (row,), ((_, experience),) = steps(folder, read_jsonl), experiences
        counted = experience.rollout.response_mask
        at_zero = 0.5 * experience.returns[counted].square().mean().item()
        losses[clip] = row["value_loss"] / at_zero
    assert losses["1e-6"] >= 1 - 1e-4
    assert losses["0"] < 0.9


def test_gamma_discounts_the_score_token_by_token(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, experiences: Experiences
) -> None:
    """KL and critic are 0 at first, so a token's return is score * .5 ^ (tokens after it)."""
    options = ("ppo.gamma=0.5", "ppo.gae_lambda=1", "ppo.missing_eos_score=null")
    folder = run_ppo("run", *options, "ppo.iterations=1")
    scores = [s["score"] for s in read_jsonl(folder / "samples.jsonl")]
    ((_, experience),) = experiences
    assert max(scores) > 0
    lengths = experience.rollout.response_mask.sum(1).tolist()
    for score, length, returns in zip(scores, lengths, experience.returns.tolist(), strict=True):
        want = [score * 0.5 ** (length - 1 - t) for t in range(length)]
        assert returns[:length] == pytest.approx(want, abs=1e-4)


def test_rewards_are_whitened_where_that_is_asked_for(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, experiences: Experiences
) -> None:
    """To variance 1 over all tokens of the rollout, around the mean that they had."""
    for whitened in (True, False):
        experiences.clear()
        folder = run_ppo(
            f"whitened_{whitened}",
            f"ppo.whiten_rewards={str(whitened).lower()}",
            "ppo.missing_eos_score=null",
            "ppo.iterations=1",
        )
        scores = [s["score"] for s in read_jsonl(folder / "samples.jsonl")]
        ((_, experience),) = experiences
        counted = experience.rewards[experience.rollout.response_mask].double()
        # one score for each response, 0 on its other tokens
        plain = np.zeros(len(counted))
        plain[: len(scores)] = scores
        assert counted.mean().item() == pytest.approx(plain.mean(), abs=1e-4)
        spread = counted.var(unbiased=False).item()
        assert spread == pytest.approx(1.0 if whitened else plain.var(), rel=1e-3)
        assert abs(plain.var() - 1) > 0.1
