"""Memory that runs out: the allocator's own error, raised in the forward pass of a microbatch.

How much memory a machine has is left out: what is asked for is more than any has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from align import cli
from align.config.keys import DPORecipe, PPORecipe, RewardRecipe, SFTRecipe
from align.models import offload
from align.models.offload import kept_on_cpu
from align.models.policy import Packed
from align.stages import dpo, reward_model, sft
from align.stages.ppo import run as ppo
from align.training.microbatches import Microbatches, is_out_of_memory
from align.types import AlignError, TokenBatch, TokenGroup, TokenSequence

Row = dict[str, Any]
MORE_THAN_ANY = 2**60


@pytest.fixture
def limit_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``sizes = limit_memory(n, error)``: a trained forward of more than n tokens raises.

    Without an error it asks torch's allocator for more memory than there is.
    """
    original = Packed.hidden_states

    def limit(most: int, error: BaseException | None = None) -> list[int]:
        sizes: list[int] = []

        def limited(self: Packed, batch: TokenBatch) -> torch.Tensor:
            if torch.is_grad_enabled():
                sizes.append(batch.num_tokens)
                if batch.num_tokens > most:
                    if error is not None:
                        raise error
                    torch.empty(MORE_THAN_ANY)
            return original(self, batch)

        monkeypatch.setattr(Packed, "hidden_states", limited)
        return sizes

    return limit


@pytest.fixture
def run(
    tiny: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Any],
    write_rows: Callable[..., Path],
    demonstrations: list[Row],
    preferences: list[Row],
) -> Callable[[str, str], Path]:
    """``run("dpo", "name")``: two steps of sixteen rows."""
    rows = {"sft": demonstrations, "rm": preferences, "dpo": preferences, "ppo": demonstrations}
    recipes = {"sft": SFTRecipe, "rm": RewardRecipe, "dpo": DPORecipe, "ppo": PPORecipe}
    modules = {"sft": sft, "rm": reward_model, "dpo": dpo, "ppo": ppo}
    train = {"train": {"max_steps": 2, "minibatch": 16}}
    more = {
        "sft": train,
        "rm": train,
        "dpo": train | {"dpo": {"reference": "online"}},
        "ppo": {
            "reward": {"metric": "chrf"},
            "ppo": {"iterations": 2, "rollout_batch": 16, "epochs": 1},
            "generation": {"max_new_tokens": 8, "samples_per_prompt": 2},
        },
    }

    def run_stage(stage: str, name: str, *overrides: str) -> Path:
        data = rows[stage]
        if stage == "ppo":
            data = [{"prompt": r["prompt"], "references": [r["completion"]]} for r in data]
        tree = {
            "model": str(tiny),
            "data": {"train": str(write_rows(f"{stage}.jsonl", data)), "test_fraction": 0},
            "precision": "fp32",
            # near plain SGD: a rounding error in a tiny gradient is no full step
            "optim": {"lr": 1.0, "eps": 1.0, "schedule": "constant", "warmup_fraction": 0.0},
        }
        folder = tmp_path / name
        recipe = make_recipe(recipes[stage], tree | more[stage], f"output_dir={folder}", *overrides)
        modules[stage].run(recipe)
        return folder

    return run_stage


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_the_step_is_done_again_and_is_the_same(
    stage: str,
    run: Callable[..., Path],
    limit_memory: Callable[..., list[int]],
    read_jsonl: Callable[[Path], list[Row]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run(stage, "whole")
    capsys.readouterr()
    on_gpu = torch.OutOfMemoryError("CUDA out of memory")
    sizes = limit_memory(100, on_gpu if stage == "sft" else None)
    cut = run(stage, "cut")
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    logged = [r for r in read_jsonl(cut / "metrics.jsonl") if "tokens_per_microbatch" in r]
    tokens = [r["tokens_per_microbatch"] for r in logged]
    assert sizes[0] > 100
    assert said
    assert "the step is done again with tokens_per_microbatch=" in said[0]
    assert said[-1].endswith(f"tokens_per_microbatch={tokens[-1]:.0f}, which stays for this run")
    assert tokens[0] == tokens[1] <= 100
    # the first step found out; the second did not try again
    assert sum(size > 100 for size in sizes) == len(said)
    first, second = (load_file(f / "model" / "model.safetensors") for f in (whole, cut))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=2e-6)
    want = [r for r in read_jsonl(whole / "metrics.jsonl") if "tokens_per_microbatch" in r]
    for key in ("loss", "grad_norm", "policy_loss", "value_loss"):
        assert [r.get(key) for r in logged] == pytest.approx([r.get(key) for r in want], abs=1e-4)


def test_one_row_that_does_not_fit_is_one_line(
    run: Callable[..., Path], limit_memory: Callable[..., list[int]]
) -> None:
    limit_memory(3, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        AlignError, match=r"out of memory: one row \(.*sft.jsonl:\d+\) of"
    ) as caught:
        run("sft", "none")
    assert "\n" not in str(caught.value)
    assert "gradient_checkpointing=true" in str(caught.value)


def test_other_errors_are_not_caught(
    run: Callable[..., Path], limit_memory: Callable[..., list[int]]
) -> None:
    limit_memory(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("sft", "none")


def test_several_processes_are_told_the_number() -> None:
    sequence = TokenSequence(np.arange(20, dtype=np.int32), np.ones(20, dtype=bool))
    groups = [TokenGroup(np.zeros(0, np.int32), (sequence,))] * 4

    def visit(batch: TokenBatch, last: bool) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(AlignError, match="set tokens_per_microbatch to 40"):
        Microbatches(4096, num_processes=2).accumulate(groups, visit, lambda: None)


def test_the_allocators_own_error_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for more than any machine has; and what a command says of it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(MORE_THAN_ANY)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))  # page-locked memory's
    assert not is_out_of_memory(RuntimeError("out of luck"))
    line, code = cli._explain(caught.value)
    assert line.startswith("out of memory: ")
    assert code == 2


# ---------------------------------------------------------------- activations in the CPU's memory


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_offloaded_activations_end_in_the_same_weights(
    stage: str,
    run: Callable[..., Path],
    limit_memory: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a CPU, where the key is refused, with that refusal taken away; memory runs out once."""
    whole = run(stage, "whole")
    with pytest.raises(AlignError, match="activation_offload: has no effect on a cpu"):
        run(stage, "refused", "activation_offload=true")
    asked: list[torch.nn.Module] = []

    def watched(model: torch.nn.Module) -> saved_tensors_hooks:
        asked.append(model)
        return kept_on_cpu(model)

    monkeypatch.setattr("align.stages.common.require_gpu", lambda device: None)
    monkeypatch.setattr("align.models.policy.kept_on_cpu", watched)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    limit_memory(100, None)
    cut = run(stage, "cut", "activation_offload=true")
    assert "the step is done again" in capsys.readouterr().out
    assert len({id(model) for model in asked}) == (2 if stage == "ppo" else 1)  # actor and critic
    folders = ("model", "critic") if stage == "ppo" else ("model",)
    for folder in folders:
        want, got = (load_file(f / folder / "model.safetensors") for f in (whole, cut))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-6)
