from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.config.sections import RewardTerm
from align.models import load_scalar_model, load_tokenizer
from align.rewards import build_reward
from align.rewards import model as module
from align.rewards.model import ModelReward, reward_model_loader
from align.types import AlignError, Text, TokenGroup

CPU = torch.device("cpu")
PROMPTS = ["red cat: ", "red cat: ", "blue sea: ", "red cat: "]
RESPONSES = ["good dog", "bad", "sun moon sun moon", ""]
QUESTION = ({"role": "user", "content": "red cat?"},)


def saved_reward_model(base: Path, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = load_scalar_model(str(base), device=CPU, precision="fp32")
    model.save(folder, load_tokenizer(str(base)))
    return folder


@pytest.fixture(scope="module")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_reward_model(tiny, tmp_path_factory.mktemp("rm") / "model")


def load(folder: Path, budget: int = 4096) -> ModelReward:
    loader = reward_model_loader(
        CPU,
        precision="fp32",
        attention="auto",
        trust_remote_code=False,
        tokens_per_microbatch=budget,
    )
    return loader(str(folder))


def plain_score(folder: Path, prompt: str, response: str) -> float:
    """What plain transformers says; prompt and response are tokenised apart, as in sampling."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    ids += tokenizer(response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("budget", [4096, 9])
def test_score_is_plain_transformers_of_the_text(reward_model: Path, budget: int) -> None:
    got = load(reward_model, budget)(PROMPTS, RESPONSES, [()] * 4)
    want = [
        plain_score(reward_model, prompt, f"{response}</s>")
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert got == pytest.approx(want, abs=1e-5)
    assert len(set(got)) == 4


def test_turns_are_scored_by_the_models_own_template(tiny_chat: Path, tmp_path: Path) -> None:
    folder = saved_reward_model(tiny_chat, tmp_path / "rm")
    got = load(folder)([QUESTION, QUESTION], ["good dog", "bad"], [(), ()])
    opened = "<|im_start|>user\nred cat?<|im_end|>\n<|im_start|>assistant\n"
    want = [plain_score(folder, opened, f"{text}<|im_end|>") for text in ("good dog", "bad")]
    assert got == pytest.approx(want, abs=1e-5)


def test_neighbours_share_their_prompt(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TokenGroup] = []
    original = module.pack

    def spying(groups: Sequence[TokenGroup], **options: int) -> object:
        seen.extend(groups)
        return original(groups, **options)

    monkeypatch.setattr(module, "pack", spying)
    load(reward_model)(PROMPTS, RESPONSES, [()] * 4)
    assert [len(g.continuations) for g in seen] == [2, 1, 1]


def test_nothing_to_score(reward_model: Path) -> None:
    assert load(reward_model)([], [], []) == []


def test_mode_is_left_alone_and_nothing_is_trained(reward_model: Path) -> None:
    reward = load(reward_model)
    assert not any(p.requires_grad for p in reward.model.parameters())
    reward.model.train()
    reward(["red"], ["cat"], [()])
    assert reward.model.training


def test_mean_of_the_training_scores(reward_model: Path, tiny: Path, tmp_path: Path) -> None:
    assert load(reward_model).mean == 0.0
    folder = saved_reward_model(tiny, tmp_path / "rm")
    (folder / "reward_stats.json").write_text(json.dumps({"mean": 1.5, "gain": 2.0}))
    assert load(folder).mean == 1.5
    terms = [RewardTerm(model=str(folder), weight=2.0), RewardTerm(metric="chrf", weight=0.1)]
    assert build_reward(terms, load_model=load).mean == 3.0  # type: ignore[attr-defined]


def test_weighted_sum_of_two_models(reward_model: Path, tiny: Path, tmp_path: Path) -> None:
    other = saved_reward_model(tiny, tmp_path / "rm", seed=1)
    terms = [RewardTerm(model=str(reward_model), weight=0.5), RewardTerm(model=str(other))]
    total = build_reward(terms, load_model=load)(PROMPTS, RESPONSES, [()] * 4)
    first, second = (load(folder)(PROMPTS, RESPONSES, [()] * 4) for folder in (reward_model, other))
    want = [0.5 * a + b for a, b in zip(first, second, strict=True)]
    assert total == pytest.approx(want, abs=1e-6)


def test_a_language_model_is_refused(tiny: Path) -> None:
    with pytest.raises(AlignError, match="no `score` head"):
        load(tiny)


@pytest.mark.parametrize("prompt", ["red cat", QUESTION])
def test_a_template_is_needed_for_turns_only(reward_model: Path, prompt: Text) -> None:
    if isinstance(prompt, str):
        assert len(load(reward_model)([prompt], ["dog"], [()])) == 1
        return
    with pytest.raises(AlignError, match="no chat template"):
        load(reward_model)([prompt], ["dog"], [()])
