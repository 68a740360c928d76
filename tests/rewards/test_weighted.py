from __future__ import annotations

import pytest

from align.config.sections import RewardTerm
from align.rewards import FunctionReward, MetricReward, WeightedReward, build_reward
from align.types import AlignError, RewardSource

LENGTH = FunctionReward("length", lambda responses: [len(r) for r in responses])
ONE = FunctionReward("one", lambda responses: [1.0] * len(responses))


def no_model(name: str) -> RewardSource:
    raise AssertionError(f"loaded {name}")


def test_weighted_sum() -> None:
    # 2 * length - .5 * 1
    reward = WeightedReward([(2.0, LENGTH), (-0.5, ONE)])
    assert reward(["p", "p"], ["abc", ""], [(), ()]) == [5.5, -0.5]
    assert reward.name == "2*length + -0.5*one"


def test_terms_that_disagree_in_number_are_not_cut() -> None:
    class Short:
        name = "short"

        def __call__(self, prompts: object, responses: object, references: object) -> list[float]:
            return [1.0]

    with pytest.raises(ValueError, match="shorter"):
        WeightedReward([(1.0, LENGTH), (1.0, Short())])(["p", "p"], ["a", "b"], [(), ()])


def test_one_term_of_weight_1_is_the_source_itself() -> None:
    reward = build_reward([RewardTerm(metric="chrf")], load_model=no_model)
    assert isinstance(reward, MetricReward)
    assert reward.name == "chrf"


def test_one_term_keeps_its_weight() -> None:
    reward = build_reward([RewardTerm(metric="chrf", weight=0.01)], load_model=no_model)
    assert reward(["p"], ["same words"], [("same words",)]) == pytest.approx([1.0])


def test_models_are_loaded_by_the_caller() -> None:
    loaded = []

    def load_model(name: str) -> RewardSource:
        loaded.append(name)
        return ONE

    terms = [RewardTerm(model="runs/rm/model"), RewardTerm(metric="chrf", weight=0.1)]
    reward = build_reward(terms, load_model=load_model)
    assert loaded == ["runs/rm/model"]
    assert reward(["p"], ["same words"], [("same words",)]) == pytest.approx([11.0])


def test_functions_are_loaded_by_name() -> None:
    with pytest.raises(AlignError, match="no module 'nowhere_at_all'"):
        build_reward([RewardTerm(function="nowhere_at_all:f")], load_model=no_model)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "reward: is empty"),
        ([RewardTerm()], "exactly one of model, function, metric; this one sets none"),
        ([RewardTerm(model="m", metric="chrf")], "this one sets model and metric"),
    ],
)
def test_terms_that_name_no_reward(terms: list[RewardTerm], message: str) -> None:
    with pytest.raises(AlignError, match=message):
        build_reward(terms, load_model=no_model)
