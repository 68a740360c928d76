"""Shared base of four roles: what is shared, what is not, and that sharing changes no number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.keys import PPORecipe, RewardRecipe
from align.config.sections import LoraOptions
from align.data.tokens.packing import collate
from align.models import load_policy, load_scalar_model, scalar_model_on
from align.models.load import weights_hash
from align.rewards.model import ModelReward
from align.stages import reward_model, shared_base
from align.stages.common import open_session
from align.stages.ppo import run as ppo
from align.stages.ppo.roles import Roles, load_roles
from align.types import AlignError, TokenGroup, TokenSequence

CPU = torch.device("cpu")
Row = dict[str, Any]
RunPPO = Callable[..., Path]


def train_reward(model: Path, folder: Path, pairs: Path, make_recipe: Any, *more: str) -> Path:
    tree = {
        "model": str(model),
        "output_dir": str(folder),
        "precision": "fp32",
        "data": {"train": str(pairs), "test_fraction": 0},
        "train": {"max_steps": 6, "minibatch": 16},
        "optim": {"lr": 0.02},
    }
    reward_model.run(make_recipe(RewardRecipe, tree, *more))
    return folder / "model"


@pytest.fixture
def reward(
    tiny_sft: Path,
    tmp_path: Path,
    make_recipe: Any,
    write_rows: Callable[..., Path],
    preferences: list[Row],
) -> Path:
    """A reward model trained as an adapter of rank 3 on the SFT model."""
    pairs = write_rows("pairs.jsonl", preferences)
    return train_reward(tiny_sft, tmp_path / "rm", pairs, make_recipe, "lora.r=3", "lora.alpha=6")


@pytest.fixture
def tree(tiny_sft: Path, write_rows: Callable[..., Path], demonstrations: list[Row]) -> Row:
    rows = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in demonstrations]
    return {
        "model": str(tiny_sft),
        "data": {"train": str(write_rows("prompts.jsonl", rows)), "test_fraction": 0},
        "precision": "fp32",
        "lora": {"r": 4},
        "generation": {"max_new_tokens": 8, "samples_per_prompt": 2},
        "ppo": {"iterations": 1, "rollout_batch": 16, "epochs": 2, "num_minibatches": 2},
        "optim": {"lr": 0.003, "schedule": "constant", "warmup_fraction": 0.0},
    }


@pytest.fixture
def roles_of(tree: Row, tmp_path: Path, make_recipe: Any) -> Callable[..., Roles]:
    def load(*overrides: str) -> Roles:
        where = f"output_dir={tmp_path / 'roles'}"
        recipe = make_recipe(PPORecipe, tree, where, "overwrite=true", *overrides)
        return load_roles(recipe, open_session(recipe, "ppo"))

    return load


def frozen(model: torch.nn.Module) -> set[int]:
    """Return the memory addresses of the backbone's untrained weights."""
    backbone = model.backbone  # type: ignore[union-attr]
    return {p.data_ptr() for n, p in backbone.named_parameters() if "lora_" not in n}


def held_bytes(*models: torch.nn.Module) -> int:
    parameters = {p.data_ptr(): p for model in models for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


def as_if_trained(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


# ---------------------------------------------------------------- what is shared


def test_four_roles_hold_the_base_once(
    reward: Path, tiny_sft: Path, roles_of: Callable[..., Roles], capsys: Any
) -> None:
    roles = roles_of(f"reward={{model: {reward}}}")
    assert isinstance(roles.reward, ModelReward)
    models = (roles.actor, roles.critic, roles.reward.model)
    assert len(frozen(roles.actor)) > 10
    assert frozen(roles.actor) == frozen(roles.critic) == frozen(roles.reward.model)
    whole = held_bytes(load_policy(str(tiny_sft), device=CPU, precision="fp32"))
    adapters = sum(p.numel() * 4 for m in models for n, p in m.named_parameters() if "lora_" in n)
    heads = 4 * 32 * 4  # float32; an original and a trained head of each scalar model
    assert held_bytes(*models) == whole + adapters + heads
    assert "shared base weights: actor, reward, critic, reference" in capsys.readouterr().out
    assert not any(p.requires_grad for p in roles.reward.model.parameters())
    assert {n for n, p in roles.critic.named_parameters() if p.requires_grad} == {
        n for n, _ in roles.critic.named_parameters() if "lora_" in n or "to_save" in n
    }


def test_an_adapter_of_other_weights_stays_apart_and_says_so(
    reward: Path,
    tiny: Path,
    tmp_path: Path,
    make_recipe: Any,
    roles_of: Callable[..., Roles],
    capsys: Any,
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    other = train_reward(tiny, tmp_path / "other", pairs, make_recipe, "lora.r=3")
    roles = roles_of(f"reward={{model: {other}}}")
    assert not frozen(roles.actor) & frozen(roles.reward.model)  # type: ignore[attr-defined]
    assert f"{other} has weights of its own, because its adapter is on" in capsys.readouterr().out
    whole = train_reward(tiny, tmp_path / "whole", pairs, make_recipe)
    roles = roles_of(f"reward={{model: {whole}}}")
    out = capsys.readouterr().out
    assert f"{whole} has weights of its own, because no adapter with a score head is" in out
    # critic and reward model are then two adapters' worth of one model, apart from the actor
    assert frozen(roles.critic) == frozen(roles.reward.model)  # type: ignore[attr-defined]
    assert not frozen(roles.actor) & frozen(roles.critic)
    assert f"critic: on the weights of {whole}, which are held once" in out


def test_the_adapter_of_a_policy_is_no_reward_models(
    tiny_sft: Path, tree: Row, roles_of: Callable[..., Roles], tmp_path: Path, make_recipe: Any
) -> None:
    """It has the same base, but a score head on it would be random."""
    chrf = "reward={metric: chrf}"
    ppo.run(make_recipe(PPORecipe, tree, f"output_dir={tmp_path / 'first'}", chrf))
    policy_folder = tmp_path / "first" / "model"
    assert (tmp_path / "first" / "model_adapter" / "trunk.json").is_file()
    with pytest.raises(AlignError, match=r"is a language model .* without a trained score head"):
        roles_of(f"reward={{model: {policy_folder}}}")
    roles = roles_of(chrf, f"critic.model={policy_folder}")
    assert roles.critic.fresh_head
    assert not frozen(roles.actor) & frozen(roles.critic)


def test_full_fine_tuning_shares_nothing(reward: Path, roles_of: Callable[..., Roles]) -> None:
    roles = roles_of(f"reward={{model: {reward}}}", "lora=null")
    models = (roles.actor, roles.critic, roles.reward.model)  # type: ignore[attr-defined]
    places = [frozen(model) for model in models]
    assert len(set.union(*places)) == sum(map(len, places))
    assert all(p.requires_grad for m in models[:2] for p in m.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "gemma3"])
def test_head_on_a_shared_base_is_a_plain_classifier(
    name: str, architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = architecture(name)
    actor = load_policy(str(folder), device=CPU, precision="fp32", lora=LoraOptions(r=2))
    as_if_trained(actor)  # the actor's adapter must not reach the other role
    made = scalar_model_on(actor, name="critic", lora=LoraOptions(r=4))
    plain = load_scalar_model(str(folder), device=CPU, precision="fp32", lora=LoraOptions(r=4))
    assert made is not None
    assert frozen(made) == frozen(actor)
    for model in (made, plain):
        as_if_trained(model)
    answer = TokenSequence(torch.tensor([7, 8, 9, 2]).int().numpy(), torch.ones(4).bool().numpy())
    batch = collate([TokenGroup(torch.tensor([1, 20, 30]).int().numpy(), (answer, answer))])
    for at in ("last", "counted"):
        torch.testing.assert_close(made(batch, at=at), plain(batch, at=at), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- that it changes no number


def test_scores_and_values_are_those_of_the_merged_model(
    reward: Path, roles_of: Callable[..., Roles], tmp_path: Path, demonstrations: list[Row]
) -> None:
    shared = roles_of(f"reward={{model: {reward}}}")
    apart = tmp_path / "apart" / "model"
    shutil.copytree(reward, apart)  # without its adapter
    separate = roles_of(f"reward={{model: {apart}}}")
    assert frozen(shared.reward.model) != frozen(separate.reward.model)  # type: ignore[attr-defined]
    prompts = [r["prompt"] for r in demonstrations[:8]]
    responses = [r["completion"] for r in demonstrations[:8]]
    got, want = (r.reward(prompts, responses, [()] * 8) for r in (shared, separate))
    assert torch.tensor(want).std() > 0.1
    assert got == pytest.approx(want, abs=1e-5)
    # the critic starts as the reward model, whose scores are the values at a sequence's end
    source = separate.reward
    groups = source._groups(prompts, responses)  # type: ignore[attr-defined]
    for roles in (shared, separate):
        found = roles.critic(collate(groups), at="last")
        assert found.tolist() == pytest.approx(want, abs=1e-5)


def run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every role has weights of its own, as without a shared base."""
    monkeypatch.setattr(shared_base, "scalar_model_on", lambda *args, **options: None)


def test_a_ppo_iteration_is_that_of_separate_models(
    tree: Row, tmp_path: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch, read_jsonl: Any
) -> None:
    """The same adapters on shared weights and on copies of them: losses, and what is learnt."""

    def load(recipe: PPORecipe, session: Any) -> Roles:
        roles = load_roles(recipe, session)
        for model in (roles.actor, roles.critic):
            as_if_trained(model)  # random heads and adapters, the same in both
        return roles

    monkeypatch.setattr(ppo, "load_roles", load)

    def run(name: str) -> tuple[Path, Row]:
        folder = tmp_path / name
        chrf = "reward={metric: chrf, weight: 0.1}"
        ppo.run(make_recipe(PPORecipe, tree, f"output_dir={folder}", chrf))
        return folder, next(r for r in read_jsonl(folder / "metrics.jsonl") if "policy_loss" in r)

    shared, got = run("shared")
    assert json.loads((shared / "manifest.json").read_text())["one_trunk"][:2] == [
        "actor",
        "critic",
    ]
    run_apart(monkeypatch)
    separate, want = run("separate")
    numbers = [k for k in want if "second" not in k]
    assert [got[k] for k in numbers] == pytest.approx([want[k] for k in numbers], abs=1e-5)
    for part in ("model", "critic"):
        first, second = (load_file(f / part / "model.safetensors") for f in (shared, separate))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what is saved


def test_saving_one_role_leaves_the_others_as_they_are(
    reward: Path, roles_of: Callable[..., Roles], tmp_path: Path
) -> None:
    roles = roles_of(f"reward={{model: {reward}}}")
    before = weights_hash(roles.actor.backbone)
    as_if_trained(roles.actor)
    as_if_trained(roles.critic)
    tokenizer = roles.reward.tokenizer  # type: ignore[attr-defined]
    ids = [1, 20, 30, 40, 41, 2]
    alone = TokenSequence(torch.tensor(ids).int().numpy(), torch.ones(6).bool().numpy())
    batch = collate([TokenGroup(torch.zeros(0).int().numpy(), (alone,))])
    with torch.no_grad():
        logprobs, values = roles.actor(batch).logprobs, roles.critic(batch, at="last")
        roles.actor.save(tmp_path / "model", tokenizer)
        roles.critic.save(tmp_path / "critic", tokenizer)
        assert weights_hash(roles.actor.backbone) == before
        torch.testing.assert_close(roles.critic(batch, at="last"), values, rtol=0, atol=0)
        actor = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        found = actor(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
        found = found.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(found, logprobs, rtol=0, atol=1e-5)
        critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
        torch.testing.assert_close(critic(torch.tensor([ids])).logits[0], values, rtol=0, atol=1e-5)


def test_a_saved_critic_resumes_on_the_shared_base(
    tree: Row, roles_of: Callable[..., Roles], tmp_path: Path, make_recipe: Any
) -> None:
    chrf = "reward={metric: chrf}"
    ppo.run(make_recipe(PPORecipe, tree, f"output_dir={tmp_path / 'first'}", chrf))
    roles = roles_of(chrf, f"critic.model={tmp_path / 'first' / 'critic'}")
    assert frozen(roles.critic) == frozen(roles.actor)
    saved = load_file(tmp_path / "first" / "critic" / "model.safetensors")["score.weight"]
    heads = [p for n, p in roles.critic.named_parameters() if "to_save" in n]
    assert torch.equal(heads[0], saved)


def test_broken_adapter_is_one_line(reward: Path, roles_of: Callable[..., Roles]) -> None:
    (reward.parent / "model_adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_adapter: cannot be loaded: .* not JSON") as caught:
        roles_of(f"reward={{model: {reward}}}")
    assert "\n" not in str(caught.value)
