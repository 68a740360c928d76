from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu import sentence_chrf
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from align.config.keys import EvalRecipe, PPORecipe, RewardRecipe
from align.evaluation import harness
from align.models import Policy, load_policy, load_scalar_model, load_tokenizer
from align.models.policy import ScalarModel
from align.stages import reward_model
from align.stages.ppo import rollouts as ppo_rollouts
from align.stages.ppo import run as ppo
from align.stages.ppo import update as ppo_update
from align.stages.ppo.metrics import require_first_ratio
from align.types import AlignError, Experience, TokenGroup
from tools.trust import Trust

CPU = torch.device("cpu")
Row = dict[str, Any]
ReadJsonl = Callable[[Path], list[Row]]
RunPPO = Callable[..., Path]
MakeRecipe = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("rewards_module")


@pytest.mark.parametrize("lora", ["lora=null", "lora={r: 4}"])
def test_sampling_with_vllm(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, fake_vllm: Any, lora: str
) -> None:
    """Old log-probs are the policy's own in every iteration, and vLLM has its weights of then."""
    logged = steps(run_ppo("run", "generation.engine=vllm", lora), read_jsonl)
    assert len(logged) == 3
    assert max(row["first_ratio_error"] for row in logged) < 1e-5
    assert all(0 < row["engine_mismatch"] < 1e-4 for row in logged)
    assert logged[-1]["kl"] > 1e-3  # the weights had moved
    assert len(fake_vllm.started) == 1


def test_a_resumed_run_samples_with_vllm_what_the_whole_run_did(
    run_ppo: RunPPO,
    read_jsonl: ReadJsonl,
    fake_vllm: Any,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[[Path, Path], None],
) -> None:
    options = ("generation.engine=vllm", "train.save_every=1")
    whole = run_ppo("whole", *options)
    with stop_at(ppo, "shaped_rewards", 2):
        run_ppo("killed", *options)
    killed = run_ppo("killed", *options, "resume=auto")
    mismatches = [
        [row["engine_mismatch"] for row in steps(folder, read_jsonl)] for folder in (whole, killed)
    ]
    assert mismatches[0] == mismatches[1]
    assert_same_weights(whole / "model", killed / "model")


def steps(folder: Path, read_jsonl: ReadJsonl) -> list[Row]:
    return [r for r in read_jsonl(folder / "metrics.jsonl") if "policy_loss" in r]


def plain_scores(model: Path, rows: Sequence[Row], key: str = "response") -> list[float]:
    """By transformers alone; prompt and response are tokenised apart, as in sampling."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    scores = []
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        ids += tokenizer(row[key] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores.append(plain(torch.tensor([ids])).logits.item())
    return scores


def test_a_score_beyond_float32_is_no_finished_run(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, tmp_path: Path
) -> None:
    reward = "reward={function: tiny_rewards:beyond_float32}"
    match = r"the score became 1e\+39, too large for float32, on .*mend reward"
    with pytest.raises(AlignError, match=match):
        run_ppo(
            "run", reward, "train.on_nonfinite=stop", "data.test_fraction=0", "ppo.iterations=2"
        )
    rows = read_jsonl(tmp_path / "run" / "nonfinite.jsonl")
    assert all(row["what"] == "score" and row["responses"] for row in rows)
    assert not (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------- gates of the first iteration


@pytest.mark.parametrize("options", [[], ["lora.r=4"], ["gradient_checkpointing=true"]])
def test_first_ratio_is_1_and_first_kl_is_0(
    options: list[str], run_ppo: RunPPO, read_jsonl: ReadJsonl
) -> None:
    folder = run_ppo("run", *options, "ppo.num_minibatches=2", "train.tokens_per_microbatch=64")
    found = steps(folder, read_jsonl)
    assert len(found) == 3
    for row in found:
        assert row["first_ratio_error"] < 1e-5
    assert abs(found[0]["kl"]) < 1e-5
    assert abs(found[-1]["kl"]) > 1e-4
    assert found[0]["approx_kl"] >= 0


def test_a_policy_that_trains_otherwise_than_it_samples_stops_the_run(
    run_ppo: RunPPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_otherwise(monkeypatch)
    with pytest.raises(AlignError, match=r"off from 1 by 0\.0\d+ \(first_ratio_error; here, in"):
        run_ppo("run")


def train_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tokens other probabilities in training, and fail at any step that is taken then."""
    plain = Policy.forward

    def otherwise(self: Policy, batch: Any, *, temperature: float = 1.0, **more: Any) -> Any:
        return plain(self, batch, temperature=temperature * (1 + 1e-3 * self.training), **more)

    monkeypatch.setattr(Policy, "forward", otherwise)
    monkeypatch.setattr(torch.optim.AdamW, "step", pytest.fail)  # nothing has been changed by then


def test_the_ratio_is_required_where_the_first_step_is_skipped(
    run_ppo: RunPPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_otherwise(monkeypatch)
    asked: list[int] = []

    def accepts(self: Any, step: int, numbers: Any, ids: Any, **options: Any) -> bool:
        asked.append(step)
        return len(asked) > 2

    monkeypatch.setattr(ppo.FiniteGuard, "accepts", accepts)
    with pytest.raises(AlignError, match="first_ratio_error"):
        run_ppo("run", "ppo.epochs=1", "ppo.num_minibatches=1")
    assert asked == [1, 2, 3]


def test_the_ratio_is_required_of_a_resumed_run(
    run_ppo: RunPPO, stop_at: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on with another version of a library or on another machine."""
    with stop_at(ppo, "shaped_rewards", 2):
        run_ppo("run", "train.save_every=1")
    train_otherwise(monkeypatch)
    with pytest.raises(AlignError, match="first_ratio_error"):
        run_ppo("run", "train.save_every=1", "resume=auto")


@pytest.mark.parametrize("role", ["ref_logprobs", "critic"])
def test_numbers_that_are_not_finite_name_the_prompts_that_they_came_from(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Rows 4 and 5 of the first rollout are both samples of its third prompt, 13 is the other."""
    original, rollouts, wanted = ppo_rollouts.over_rollout, list[int](), list[str]()

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        found = original(*args, **options)
        rollouts.append(len(found))
        if len(found) == 16 and rollouts.count(16) == (1 if role == "ref_logprobs" else 2):
            for row in (4, 5, 13):
                found[row, 0] = -torch.inf
        return found

    def sample(self: Any, split: Any, members: Any, **options: Any) -> Any:
        if len(members) == 8 and not wanted:
            wanted.extend(split.examples[members[i]].id for i in (2, 6))
        return sampling(self, split, members, **options)

    sampling = ppo_rollouts.RolloutWorker.sample
    monkeypatch.setattr(ppo_rollouts.RolloutWorker, "sample", sample)
    monkeypatch.setattr(ppo_rollouts, "over_rollout", broken)
    folder = run_ppo("run", "data.test_fraction=0", "train.on_nonfinite=skip", "ppo.iterations=2")
    (row,) = read_jsonl(folder / "nonfinite.jsonl")
    what = "reference log-probability" if role == "ref_logprobs" else "critic's value"
    assert row == {"step": 1, "what": what, "value": "-inf", "ids": wanted}


def test_a_tie_between_experts_and_bf16_do_not_stop_it(tiny: Path) -> None:
    actor = load_policy(str(tiny), device=CPU, precision="fp32")
    recipe = ratio_recipe()
    require_first_ratio(actor, 9e-5, recipe)
    for error in (1.1e-4, float("nan")):
        with pytest.raises(AlignError, match="first_ratio_error"):
            require_first_ratio(actor, error, recipe)
    actor.inner.config.num_experts = 4
    require_first_ratio(actor, 1e-2, recipe)
    actor.inner.config.num_experts, actor.precision = None, "bf16"
    require_first_ratio(actor, 0.2, recipe)


@pytest.mark.parametrize(
    ("temperature", "layers", "limit"),
    [(1.0, 8, 1e-4), (2.0, 1, 1e-4), (0.01, 2, 1e-2), (0.2, 24, 1.5e-3), (1.0, 32, 4e-4)],
)
def test_rounding_at_low_temperatures_and_in_deep_models_stops_nothing(
    temperature: float, layers: int, limit: float, tiny: Path
) -> None:
    actor = load_policy(str(tiny), device=CPU, precision="fp32")
    actor.inner.config.num_hidden_layers = layers
    recipe = ratio_recipe(temperature=temperature)
    require_first_ratio(actor, limit * 0.99, recipe)
    with pytest.raises(AlignError, match="first_ratio_error"):
        require_first_ratio(actor, limit * 1.01, recipe)


def test_advice_on_the_ratio_is_not_in_force_already(tiny: Path) -> None:
    actor = load_policy(str(tiny), device=CPU, precision="fp32")
    for recipe, advice in (
        (ratio_recipe(engine="vllm"), "try generation.engine=align and attention=segments, and "),
        (replace(ratio_recipe(), attention="segments"), ""),
    ):
        with pytest.raises(AlignError) as caught:
            require_first_ratio(actor, 1.0, recipe)
        assert f"first step on; {advice}report it" in str(caught.value)


def ratio_recipe(**generation: Any) -> PPORecipe:
    recipe = PPORecipe(model="m", output_dir="o")
    return replace(recipe, generation=replace(recipe.generation, **generation))


def test_numbers_are_those_of_the_samples(run_ppo: RunPPO, read_jsonl: ReadJsonl) -> None:
    folder = run_ppo("run")
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 3 * 16
    assert {"iteration", "id", "prompt", "response", "score", "kl", "finished"} <= samples[0].keys()
    for number, row in enumerate(steps(folder, read_jsonl), start=1):
        mine = [s for s in samples if s["iteration"] == number]
        assert len({s["id"] for s in mine}) == 8
        assert [s["score"] for s in mine] == [s["response"].count("o") for s in mine]
        assert row["score_mean"] == pytest.approx(np.mean([s["score"] for s in mine]), abs=1e-5)
        assert row["kl"] == pytest.approx(np.mean([s["kl"] for s in mine]), abs=1e-5)
        assert row["eos_rate"] == pytest.approx(np.mean([s["finished"] for s in mine]))
    evaluated = [r for r in read_jsonl(folder / "metrics.jsonl") if "eval_score" in r]
    assert [r["step"] for r in evaluated] == [0, 3]
    assert abs(evaluated[0]["eval_kl"]) < 1e-5


# ---------------------------------------------------------------- rewards


def test_metric_and_weighted_sum(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, demonstrations: list[Row]
) -> None:
    references = {r["prompt"]: r["completion"] for r in demonstrations}

    def chrf(row: Row) -> float:
        return sentence_chrf(row["response"], [references[row["prompt"]]]).score

    one = run_ppo("one", "reward={metric: chrf}", "ppo.iterations=1")
    rows = read_jsonl(one / "samples.jsonl")
    assert [r["score"] for r in rows] == pytest.approx([chrf(r) for r in rows], rel=1e-5)
    several = "reward=[{metric: chrf, weight: 0.1}, {function: 'tiny_rewards:length', weight: -2}]"
    both = run_ppo("both", several, "ppo.iterations=1")
    rows = read_jsonl(both / "samples.jsonl")
    want = [0.1 * chrf(r) - 2 * len(r["response"]) / 10 for r in rows]
    assert [r["score"] for r in rows] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_one_response_has_one_score(
    run_ppo: RunPPO,
    reward_folder: Path,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    write_rows: Callable[..., Path],
    read_jsonl: ReadJsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In PPO, in reward-model training, in align eval, and through plain transformers."""
    folder = run_ppo("run", f"reward={{model: {reward_folder}}}", "ppo.iterations=1")
    samples = read_jsonl(folder / "samples.jsonl")
    want = plain_scores(reward_folder, samples)
    assert np.std(want) > 0.05
    assert [s["score"] for s in samples] == pytest.approx(want, abs=1e-5)

    firsts, seconds = samples[0::2], samples[1::2]
    outputs = write_rows("outputs.jsonl", firsts)
    evaluation = {
        "models": {"sampled": str(outputs)},
        "output_dir": str(tmp_path / "eval"),
        "precision": "fp32",
        "data": str(write_rows("asked.jsonl", [{"prompt": s["prompt"]} for s in firsts])),
        "reward": {"model": str(reward_folder)},
        "num_resamples": 10,
    }
    harness.run(make_recipe(EvalRecipe, evaluation))
    found = {r["prompt"]: r["reward"] for r in read_jsonl(tmp_path / "eval/outputs/sampled.jsonl")}
    assert [found[s["prompt"]] for s in firsts] == pytest.approx(want[0::2], abs=1e-5)

    recorded: list[np.ndarray] = []
    original = reward_model.scores_of

    def spying(scalar: ScalarModel, groups: Sequence[TokenGroup], budget: int) -> np.ndarray:
        recorded.append(original(scalar, groups, budget))
        return recorded[-1]

    monkeypatch.setattr(reward_model, "scores_of", spying)
    pairs = [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
        for a, b in zip(firsts, seconds, strict=True)
        if a["response"] != b["response"] and a["response"].strip() and b["response"].strip()
    ]
    assert len(pairs) > 4
    again = {
        "model": str(reward_folder),
        "output_dir": str(tmp_path / "again"),
        "precision": "fp32",
        "data": {"train": str(write_rows("pairs.jsonl", pairs)), "test_fraction": 0},
        "train": {"max_steps": 1},
        "optim": {"lr": 1e-30},
    }
    reward_model.run(make_recipe(RewardRecipe, again))
    wanted = [
        score
        for pair in zip(
            plain_scores(reward_folder, pairs, "chosen"),
            plain_scores(reward_folder, pairs, "rejected"),
            strict=True,
        )
        for score in pair
    ]
    assert recorded[0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_reward_model_with_a_tokenizer_of_its_own(
    run_ppo: RunPPO,
    architecture: Callable[[str], Path],
    tmp_path: Path,
    read_jsonl: ReadJsonl,
    experiences: list[tuple[Row, Experience]],
) -> None:
    """Same words, another vocabulary: the critic can then not start from it."""
    base = architecture("gpt2")
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(["good dog", " cat", "moon"])
    torch.manual_seed(0)
    scalar = load_scalar_model(str(base), device=CPU, precision="fp32")
    scalar.inner.resize_token_embeddings(len(tokenizer))
    scalar.save(tmp_path / "other", tokenizer)
    folder = run_ppo("run", f"reward={{model: {tmp_path / 'other'}}}", "ppo.iterations=1")
    samples = read_jsonl(folder / "samples.jsonl")
    want = plain_scores(tmp_path / "other", samples)
    assert [s["score"] for s in samples] == pytest.approx(want, abs=1e-5)
    assert not experiences[0][1].values.any()  # a new head says 0 everywhere
    assert json.loads((folder / "critic" / "config.json").read_text())["model_type"] == "llama"


def test_missing_eos_and_the_reward_models_mean(
    run_ppo: RunPPO,
    reward_folder: Path,
    read_jsonl: ReadJsonl,
    experiences: list[tuple[Row, Experience]],
) -> None:
    mean = json.loads((reward_folder / "reward_stats.json").read_text())["mean"]
    assert abs(mean) > 1e-3
    reward = f"reward={{model: {reward_folder}}}"
    for name, value in (("fixed", -3.0), ("own", None)):
        experiences.clear()
        text = "null" if value is None else str(value)
        folder = run_ppo(
            name,
            reward,
            f"ppo.missing_eos_score={text}",
            "ppo.iterations=1",
            "generation.max_new_tokens=5",
        )
        samples = read_jsonl(folder / "samples.jsonl")
        finished = [s["finished"] for s in samples]
        assert 0 < sum(finished) < len(finished)
        want = [s["score"] - mean if s["finished"] or value is None else value for s in samples]
        ((_, experience),) = experiences
        assert experience.scores.tolist() == pytest.approx(want, abs=1e-5)
        # kl is 0 here, so a response's rewards sum to what is paid, on its last token
        assert experience.rewards.sum(1).tolist() == pytest.approx(want, abs=1e-4)
        last = experience.rollout.response_mask.sum(1) - 1
        paid = experience.rewards[torch.arange(len(last)), last]
        assert paid.tolist() == pytest.approx(want, abs=1e-4)


# ---------------------------------------------------------------- the KL coefficient


def test_adaptive_kl_moves_towards_its_target(run_ppo: RunPPO, read_jsonl: ReadJsonl) -> None:
    # the error is clipped to a fifth: 1 -+ .2 * 16 sequences / 64 = .95, 1.05
    options = ("kl.adaptive=true", "kl.horizon=64", "kl.coef=0.1", "optim.lr=0.01")
    found = steps(run_ppo("low", *options, "kl.target=0.001"), read_jsonl)
    assert found[1]["kl"] > 0.0012
    # the first KL is 0, below any target
    want = [0.1, 0.1 * 0.95, 0.1 * 0.95 * 1.05]
    assert [row["kl_coef"] for row in found] == pytest.approx(want)
    found = steps(run_ppo("high", *options, "kl.target=1000"), read_jsonl)
    assert [row["kl_coef"] for row in found] == pytest.approx([0.1, 0.095, 0.09025])
    found = steps(run_ppo("fixed", "kl.coef=0.1", "optim.lr=0.01"), read_jsonl)
    assert [row["kl_coef"] for row in found] == [0.1] * 3


def test_kl_charges_and_the_entropy_bonus_really_act(
    run_ppo: RunPPO, read_jsonl: ReadJsonl, experiences: list[tuple[Row, Experience]]
) -> None:
    options = (
        "ppo.iterations=5",
        "ppo.rollout_batch=32",
        "ppo.missing_eos_score=null",
        "generation.temperature=1",
        "optim.lr=0.01",
        "kl.coef=0",
    )
    free = steps(run_ppo("free", *options), read_jsonl)[-1]
    assert free["kl"] > 2
    for charge, estimator in (("reward", "k1"), ("loss", "k2"), ("loss", "k3")):
        experiences.clear()
        held = run_ppo(
            estimator, *options, "kl.coef=3", f"kl.charge={charge}", f"kl.estimator={estimator}"
        )
        assert steps(held, read_jsonl)[-1]["kl"] < 0.7 * free["kl"]
        charged = [options["kl_coef"] for options, _ in experiences]
        assert charged == [3.0 if charge == "reward" else 0.0] * 5
    bonus = steps(run_ppo("bonus", *options, "ppo.entropy_coef=1"), read_jsonl)[-1]
    assert bonus["entropy"] > free["entropy"] + 0.5


# ---------------------------------------------------------------- steps


def test_epochs_and_minibatches_really_step(
    run_ppo: RunPPO, spy_steps: Callable[..., dict[str, list[float]]]
) -> None:
    norms = spy_steps(ppo_update)
    run_ppo("run", "ppo.epochs=3", "ppo.num_minibatches=4", "ppo.iterations=2")
    actor, critic = norms.values()
    assert len(actor) == len(critic) == 2 * 3 * 4
    norms.clear()
    run_ppo("warm", "ppo.critic_warmup=1", "ppo.num_minibatches=2", "ppo.iterations=2")
    actor, critic = norms.values()
    assert (len(actor), len(critic)) == (4, 8)  # one iteration, and two


@pytest.mark.parametrize("budget", [4096, 70])
def test_losses_are_means_over_all_tokens(
    budget: int,
    run_ppo: RunPPO,
    read_jsonl: ReadJsonl,
    experiences: list[tuple[Row, Experience]],
) -> None:
    """At ratio 1 they are known: minus the mean advantage, and half the mean squared return."""
    folder = run_ppo(
        "run",
        "ppo.epochs=1",
        "ppo.iterations=1",
        "ppo.whiten_advantages=false",
        f"train.tokens_per_microbatch={budget}",
    )
    (row,), ((_, experience),) = steps(folder, read_jsonl), experiences
    counted = experience.rollout.response_mask
    assert counted.sum() < counted.numel()  # lengths differ
    want = -experience.advantages[counted].mean().item()
    assert abs(want) > 0.01
    assert row["policy_loss"] == pytest.approx(want, abs=1e-5)
    assert not experience.values.any()  # a new critic
    want = 0.5 * experience.returns[counted].square().mean().item()
    assert row["value_loss"] == pytest.approx(want, rel=1e-4)
    assert row["tokens"] == int(counted.sum())
    assert row["clip_fraction"] == 0


def test_gradients_of_both_are_clipped(
    run_ppo: RunPPO, spy_steps: Callable[..., dict[str, list[float]]], read_jsonl: ReadJsonl
) -> None:
    norms = spy_steps(ppo_update)
    folder = run_ppo("run", "optim.max_grad_norm=0.001", "ppo.iterations=1")
    for found in norms.values():
        assert found == pytest.approx([0.001] * 2, rel=1e-2)
    (row,) = steps(folder, read_jsonl)
    assert row["grad_norm"] > 0.01
    assert row["critic_grad_norm"] > 0.01


def test_microbatches_change_nothing(run_ppo: RunPPO, read_jsonl: ReadJsonl, trust: Trust) -> None:
    """The eight prompts fit in one prefill either way, so both runs sample the same."""
    options = ("ppo.iterations=2", "optim.lr=0.3", "optim.eps=1", "ppo.entropy_coef=0.1")
    whole = run_ppo("whole", *options)
    cut = run_ppo("cut", *options, "train.tokens_per_microbatch=70")
    for part in ("model", "critic"):
        first, second = (load_file(f / part / "model.safetensors") for f in (whole, cut))
        apart = max(((t - second[n]).abs().max() / t.abs().max()).item() for n, t in first.items())
        what = f"PPO: microbatches = one batch, weights of {part}, relative"
        trust.at_most("equivalences", what, apart, 1e-6)
    for key in ("policy_loss", "value_loss", "grad_norm", "approx_kl"):
        want, got = ([r[key] for r in steps(f, read_jsonl)] for f in (whole, cut))
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_schedule_and_the_critics_own_rate(run_ppo: RunPPO, read_jsonl: ReadJsonl) -> None:
    # 3 iterations of 2 steps, linear from .003: the last step of each is 1 - 1/6, 3/6, 5/6
    folder = run_ppo("run", "optim.schedule=linear")
    want = [0.003 * share for share in (5 / 6, 3 / 6, 1 / 6)]
    assert [r["lr"] for r in steps(folder, read_jsonl)] == pytest.approx(want)
    frozen = run_ppo("frozen", "critic.lr=1e-30")
    trained, kept = (load_file(f / "critic" / "model.safetensors") for f in (folder, frozen))
    assert kept["score.weight"].abs().max() < 1e-20  # a new head starts at 0
    assert trained["score.weight"].abs().max() > 1e-3


# ---------------------------------------------------------------- what comes out


def test_raises_a_trivial_reward(run_ppo: RunPPO, read_jsonl: ReadJsonl) -> None:
    folder = run_ppo(
        "run",
        "ppo.iterations=10",
        "ppo.rollout_batch=32",
        "ppo.missing_eos_score=null",
        "generation.temperature=1",
        "kl.coef=0.01",
        "optim.lr=0.01",
    )
    found = steps(folder, read_jsonl)
    assert found[-1]["score_mean"] > found[0]["score_mean"] + 1.5
    assert found[-1]["kl"] > 0.5
    held_out = json.loads((folder / "manifest.json").read_text())["held_out"]
    assert held_out["score"] > found[0]["score_mean"] + 1


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
def test_actor_and_critic_are_plain_transformers(
    lora: str, run_ppo: RunPPO, tiny_sft: Path
) -> None:
    folder = run_ppo("run", lora)
    actor = AutoModelForCausalLM.from_pretrained(folder / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert critic.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "</s>"
    assert AutoTokenizer.from_pretrained(folder / "critic").pad_token == "<pad>"
    before = load_file(tiny_sft / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for model in (actor, critic):
        assert not torch.equal(model.state_dict()[name], before[name])
    assert critic.state_dict()["score.weight"].abs().max() > 0


def test_critic_starts_from_the_reward_model(run_ppo: RunPPO, reward_folder: Path) -> None:
    folder = run_ppo(
        "run", f"reward={{model: {reward_folder}}}", "critic.lr=1e-30", "ppo.iterations=1"
    )
    want = load_file(reward_folder / "model.safetensors")
    found = load_file(folder / "critic" / "model.safetensors")
    assert want.keys() == found.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


# ---------------------------------------------------------------- going on

SAVING = (
    "train.save_every=1",
    "kl.adaptive=true",
    "kl.target=0.01",
    "kl.horizon=64",
    "train.eval_every=2",
)


def test_resumed_lora_run_is_the_whole_run(
    run_ppo: RunPPO, stop_at: Callable[..., Any], assert_same_weights: Callable[..., None]
) -> None:
    options = (*SAVING, "lora.r=4")
    whole = run_ppo("whole", *options)
    with stop_at(ppo, "shaped_rewards", 3):
        run_ppo("cut", *options)
    resumed = run_ppo("cut", *options, "resume=auto")
    for part in ("model", "critic"):
        assert_same_weights(whole / part, resumed / part)


def test_a_damaged_newest_checkpoint_is_not_gone_on_from(
    run_ppo: RunPPO,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    read_jsonl: ReadJsonl,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The actor of the newest could be loaded, its critic not: neither is."""
    whole = run_ppo("whole", *SAVING)
    with stop_at(ppo, "shaped_rewards", 3):
        run_ppo("cut", *SAVING)
    places = sorted((whole.parent / "cut" / "checkpoints").iterdir())
    assert [p.name for p in places] == ["step-1", "step-2"]
    critic = places[-1] / "critic.optimizer.safetensors"
    critic.write_bytes(critic.read_bytes()[:-1])
    resumed = run_ppo("cut", *SAVING, "resume=auto")
    assert "; kept as damaged-step-2, going on from step-1" in capsys.readouterr().err
    for part in ("model", "critic"):
        assert_same_weights(whole / part, resumed / part)
    texts = [[r["response"] for r in read_jsonl(f / "samples.jsonl")] for f in (whole, resumed)]
    assert texts[0] == texts[1]


def test_what_an_older_align_saved_inside_an_iteration_is_passed_over(
    run_ppo: RunPPO,
    stop_at: Callable[..., Any],
    assert_same_weights: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The iteration is done again from its start; without a checkpoint there the run is refused."""
    whole = run_ppo("whole", *SAVING)
    with stop_at(ppo, "shaped_rewards", 3):
        run_ppo("cut", *SAVING)
    folder = whole.parent / "cut" / "checkpoints"
    shutil.copytree(folder / "step-2", folder / "step-2-part-1")
    for place in ("step-2", "step-2-part-1"):  # a rollout with its scores
        (folder / place / "in_hand.safetensors").write_bytes(b"anything")
    shutil.copytree(folder.parent, whole.parent / "lost")
    resumed = run_ppo("cut", *SAVING, "resume=auto")
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "older align" in text]
    assert line.endswith(
        "step-2-part-1: an older align saved it in the middle of a PPO iteration; kept as "
        "damaged-step-2-part-1, going on from step-2"
    )
    for part in ("model", "critic"):
        assert_same_weights(whole / part, resumed / part)
    for place in ("step-1", "step-2"):
        shutil.rmtree(whole.parent / "lost" / "checkpoints" / place)
    with pytest.raises(
        AlignError, match=r"step-2-part-1: an older align .* no other checkpoint is"
    ):
        run_ppo("lost", *SAVING, "resume=auto")


def test_same_seed_same_run(
    run_ppo: RunPPO, assert_same_weights: Callable[..., None], read_jsonl: ReadJsonl
) -> None:
    first, again, other = run_ppo("a"), run_ppo("b"), run_ppo("c", "seed=1")
    assert_same_weights(first / "model", again / "model")
    texts = [[r["response"] for r in read_jsonl(f / "samples.jsonl")] for f in (first, other)]
    assert texts[0] != texts[1]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["generation.temperature=0"], "temperature"),
        (["generation.top_p=0.9"], "top_p"),
        (["reward=[]"], "reward"),
        (["ppo.rollout_batch=15"], "no multiple of generation.samples_per_prompt=2"),
        (["ppo.num_minibatches=9"], "ppo.num_minibatches: is 9, more than"),
        (["lora.r=4", "lora.dropout=0.1"], "lora.dropout: must be 0"),
        (["kl.charge=loss"], "kl.estimator: is k1"),
        (["kl.adaptive=true", "kl.coef=0"], "kl.coef: is 0"),
        (["kl.adaptive=true", "kl.horizon=2"], "kl.horizon: is 2"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    overrides: list[str], match: str, run_ppo: RunPPO, tmp_path: Path
) -> None:
    with pytest.raises(AlignError, match=match):
        run_ppo("run", *overrides)
    assert not (tmp_path / "run").exists()
