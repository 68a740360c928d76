"""The load-balancing loss over packed rows against plain transformers, a sequence at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align.commands.check import check
from align.config.keys import DPORecipe, RewardRecipe, SFTRecipe
from align.data.tokens.packing import pack
from align.models import Policy, load_policy
from align.models.router import collect_router_logits, router_loss
from align.stages import dpo, reward_model, sft
from align.types import AlignError, TokenBatch, TokenGroup, TokenSequence

CPU = torch.device("cpu")
PROMPT = [7, 9, 23, 41]
ANSWERS = [[3, 5], [11, 13, 17, 60, 2], [19]]
MIXTURES = ("mixtral", "qwen2_moe", "phimoe")


def answer(ids: list[int]) -> TokenSequence:
    return TokenSequence(np.array(ids, np.int64), np.ones(len(ids), bool))


def packed() -> TokenBatch:
    """Two answers that share a prompt, a lone sequence, and two columns of padding."""
    shared = TokenGroup(np.array(PROMPT, np.int64), tuple(answer(ids) for ids in ANSWERS[:2]))
    alone = TokenGroup(np.array([50], np.int64), (answer(ANSWERS[2]),))
    (batch,) = pack([shared, alone], tokens_per_microbatch=64)
    padded = {
        field.name: functional.pad(getattr(batch, field.name), (0, 2))
        for field in fields(batch)
        if field.name != "segments"
    }
    return replace(batch, **padded)


def plain_loss(model: Any) -> Tensor:
    """Of the same tokens, each once: the prompt's from the first answer's pass."""
    rows = [([*PROMPT, *ANSWERS[0]], 0), ([*PROMPT, *ANSWERS[1]], 4), ([50, *ANSWERS[2]], 0)]
    found = [
        model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
        for ids, _ in rows
    ]
    layers = tuple(
        torch.cat([logits[n][skip:] for logits, (_, skip) in zip(found, rows, strict=True)])
        for n in range(len(found[0]))
    )
    return load_balancing_loss_func(layers, 4, model.config.num_experts_per_tok)


def policy_of(folder: Path, **options: Any) -> Policy:
    policy = load_policy(str(folder), device=CPU, precision="fp32", **options)
    collect_router_logits(policy)
    return policy.train()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_loss_and_gradient_are_transformers_own(
    name: str, gradient_checkpointing: bool, architecture: Callable[[str], Path]
) -> None:
    folder = architecture(name)
    policy = policy_of(folder, gradient_checkpointing=gradient_checkpointing)
    policy(packed())
    loss = router_loss(policy, packed())
    assert loss is not None
    assert policy.router_logits is None  # nothing of a step is held behind it
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = plain_loss(plain)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    gate = next(n for n, p in plain.named_parameters() if "gate" in n and p.grad is not None)
    got = policy.inner.get_parameter(gate).grad
    assert got is not None
    assert got.abs().max() > 0
    torch.testing.assert_close(got, plain.get_parameter(gate).grad, rtol=1e-4, atol=1e-6)


def test_off_by_default(architecture: Callable[[str], Path]) -> None:
    policy = load_policy(str(architecture("mixtral")), device=CPU, precision="fp32")
    policy(packed())
    assert router_loss(policy, packed()) is None


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_refused_where_there_is_none(name: str, architecture: Callable[[str], Path]) -> None:
    policy = load_policy(str(architecture(name)), device=CPU, precision="fp32")
    with pytest.raises(AlignError, match=r"train.router_aux_coef: has no effect on .*: \w+ has no"):
        collect_router_logits(policy)


STAGES = {"sft": (SFTRecipe, sft), "rm": (RewardRecipe, reward_model), "dpo": (DPORecipe, dpo)}


class MeasuredOnce(Exception):
    """Instead of training."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_adds_it_for_each_of_its_units(
    stage: str,
    architecture: Callable[[str], Path],
    make_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """loss = the stage's own + coef x units x loss over the router; logged per unit, beside it."""
    rows = [{"prompt": f"red {i}", "chosen": "blue cat", "rejected": "moon"} for i in "abcdefgh"]
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe_class, module = STAGES[stage]
    tree: dict[str, Any] = {
        "model": str(architecture("mixtral")),
        "data": {"train": str(data), "test_fraction": 0.25},
        "precision": "fp32",
        "trackers": [],
    }
    if stage == "dpo":
        tree |= {"dpo": {"reference": "adapter_off"}, "lora": {"target_modules": ["q_proj"]}}
    found = []

    def measure_once(model: Any, data: Any, objective: Any, *_: Any) -> None:
        groups = list(data[0].at_hand())
        (batch,) = pack(groups, tokens_per_microbatch=10**6)
        found.append((objective.loss_fn(batch, groups), sum(map(objective.num_units, groups))))
        raise MeasuredOnce

    monkeypatch.setattr(module, "train", measure_once)
    for coef in (0.5, 2.0):
        given = f"train.router_aux_coef={coef}", f"output_dir={tmp_path / str(coef)}"
        recipe = make_recipe(recipe_class, tree, *given)
        with pytest.raises(MeasuredOnce):
            module.run(recipe)
    (half, units), (double, _) = found
    total, weight = half.sums["router_loss"]
    assert weight == units
    assert total / weight > 2.001  # 2 choices of a token, and more where they are uneven
    difference = double.loss.item() - half.loss.item()
    assert difference == pytest.approx(1.5 * total, rel=1e-4)
    assert half.sums["loss"][0] + 0.5 * total == pytest.approx(half.loss.item(), rel=1e-4)


def test_check_refuses_it_on_a_dense_model(
    architecture: Callable[[str], Path], make_recipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "red", "completion": "blue"}\n')
    recipe = make_recipe(
        SFTRecipe,
        {
            "model": str(architecture("llama")),
            "output_dir": str(tmp_path / "run"),
            "data": str(tmp_path / "rows.jsonl"),
            "train": {"router_aux_coef": 0.01},
        },
    )
    with pytest.raises(AlignError, match=r"train.router_aux_coef: has no effect on .*: llama has"):
        list(check("sft", recipe))
