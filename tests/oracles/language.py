"""A toy language that can be summed over: its models, its reward and its optimum in closed form.

A prompt is ``p`` or ``q``, a response one or two letters of ``abcd`` and the end token. The
tabular model has logits of its own for every (prompt, prefix), so it can be any distribution. It
looks at its prefix through the attention function that its config names, as any transformers model
does, so the shipped stages pack, sample and train it as they do the others.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY = ("<pad>", "</s>", "a", "b", "c", "d", "p", "q")
END, LETTERS, PROMPTS = 1, "abcd", "pq"
MOST_LETTERS = 2
BETA = 0.3
"""Reward units per nat: the KL coefficient of PPO and the beta of DPO."""

POSITIONS = 12
NEVER = -1e4
"""A logit whose probability is exactly 0 in float32."""


def level(prompt: str, text: str) -> int:
    """1 to 4, as arbitrary as can be; the reward is its logarithm.

    So a Bradley-Terry judge prefers x to y with probability level(x) / (level(x) + level(y)), and
    a data set can hold both orders in exact proportion.
    """
    return 1 + zlib.crc32(f"{prompt}>{text}".encode()) % 4


def reward(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """What `reward.function` names."""
    return [math.log(level(p, r)) for p, r in zip(prompts, responses, strict=True)]


def responses() -> list[str]:
    """Every response of the tabular language, without its end token."""
    return [
        "".join(word) for n in range(1, MOST_LETTERS + 1) for word in product(LETTERS, repeat=n)
    ]


# ---------------------------------------------------------------- models


class TabularConfig(PreTrainedConfig):
    model_type = "align_tabular"

    def __init__(self, **options: Any) -> None:
        self.vocab_size, self.hidden_size = len(VOCABULARY), len(VOCABULARY) + 2
        self.num_hidden_layers = self.num_attention_heads = 1
        self.max_position_embeddings = POSITIONS
        super().__init__(**{"eos_token_id": END, "pad_token_id": 0, **options})


class _Tabular(PreTrainedModel):
    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Each class says what it starts from."""

    def get_input_embeddings(self) -> nn.Module:
        return (self.model if hasattr(self, "model") else self).embed_tokens


class _Numbers(nn.Module):
    """A token stands for its own number."""

    num_embeddings = len(VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids[..., None].float()


class _Head(nn.Module):
    """Logits = the row, but for what the language forbids; nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        size = len(VOCABULARY)
        weight = torch.cat([torch.eye(size), torch.zeros(size, 2)], 1)
        weight[END, size] = NEVER  # no empty response
        weight[2 : 2 + len(LETTERS), size + 1] = NEVER  # none of more than MOST_LETTERS letters
        never = [name not in (*LETTERS, VOCABULARY[END]) for name in VOCABULARY]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor(never) * 2 * NEVER)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class TabularModel(_Tabular):
    """Hidden state = the row of the prefix, and whether it is the first or the last one."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        size = config.vocab_size
        self.embed_tokens = _Numbers()
        self.table = nn.Embedding(size ** (1 + MOST_LETTERS), size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        one_hot = F.one_hot(position_ids, POSITIONS)
        tokens = one_hot * self.embed_tokens(input_ids)  # [B,T,POSITIONS]
        if more.get("segments") is None and more.get("decode") is None:
            prefix = tokens.cumsum(1)  # a lone sequence: no attention at all
        else:
            prefix = self._attended(tokens, past_key_values, **more) * (position_ids[..., None] + 1)
        digits = prefix.round().long()[..., : 1 + MOST_LETTERS]
        base = self.config.vocab_size ** torch.arange(1 + MOST_LETTERS)
        ends = torch.stack([position_ids == 0, position_ids >= MOST_LETTERS], -1)
        hidden = torch.cat([self.table((digits * base).sum(-1)), ends.float()], -1)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _attended(self, tokens: Tensor, past_key_values: Any, **more: Any) -> Tensor:
        """The mean over all that a token may look at, every score being 0."""
        value, nothing = tokens[:, None], torch.zeros_like(tokens[:, None])
        key = nothing
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return attend(self, nothing, key, value, None, **more)[0][:, :, 0]


class TabularForCausalLM(_Tabular, GenerationMixin):
    """The policy and the reference."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = _Head()
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **more: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids, **more).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


class TabularForSequenceClassification(_Tabular):
    """A score for every prefix."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.score = nn.Linear(config.vocab_size + 2, config.num_labels, bias=False)
        self.post_init()


AutoConfig.register("align_tabular", TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM)
AutoModelForSequenceClassification.register(TabularConfig, TabularForSequenceClassification)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, and nothing in front or behind."""
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(VOCABULARY)}))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")


def save_tabular(folder: Path, *, seed: int = 0) -> Path:
    """A reference with random logits."""
    torch.manual_seed(seed)
    model = TabularForCausalLM(TabularConfig())
    nn.init.normal_(model.model.table.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, seed: int = 0) -> Path:
    """A tiny transformer over the same tokens, which forbids itself nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=POSITIONS,
        initializer_range=0.3, bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- what is exact


@dataclass(frozen=True)
class Exact:
    """A distribution over all responses to one prompt.

    Attributes:
        tokens: ``[N,R]``, behind the end token 0.
        texts: What the shipped decoder makes of them.
        logprobs: float64 ``[N]``, they sum to 1.
    """

    tokens: Tensor
    texts: tuple[str, ...]
    logprobs: Tensor


@torch.no_grad()
def exact(model: Any, prompt: str, *, most_tokens: int) -> Exact:
    """Enumerate every response of up to ``most_tokens`` tokens, end token included.

    ``model`` is plain transformers: nothing of this package takes part.
    """
    letters = [t for t in range(len(VOCABULARY)) if t != END]
    rows = [(*word, END) for n in range(most_tokens) for word in product(letters, repeat=n)] + list(
        product(letters, repeat=most_tokens)
    )
    tokens = torch.zeros(len(rows), most_tokens, dtype=torch.int64)
    counts = torch.zeros(len(rows), most_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        counts[i, : len(row)] = True
    start = torch.full((len(rows), 1), VOCABULARY.index(prompt))
    logits = model(input_ids=torch.cat([start, tokens], 1)).logits[:, :-1].double()
    chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    texts = ["".join(VOCABULARY[t] for t in row if t != END) for row in rows]
    return Exact(tokens, tuple(texts), torch.where(counts, chosen, 0.0).sum(1))


def optimum(reference: Exact, prompt: str) -> tuple[Tensor, float]:
    """log pi* = log pi_ref + r / beta - log Z, and beta log Z (Rafailov et al. 2023, eq. 4)."""
    scores = torch.tensor([math.log(level(prompt, t)) for t in reference.texts]).double()
    unnormalised = reference.logprobs + scores / BETA
    log_z = unnormalised.logsumexp(0)
    return unnormalised - log_z, BETA * log_z.item()


def soft_value(
    reference: Exact, prompt: str, prefix: Sequence[int], *, beta: float = BETA
) -> float:
    """beta log E_ref[exp(r / beta)] over the responses that begin with these tokens."""
    scores = torch.tensor([math.log(level(prompt, t)) for t in reference.texts]).double()
    inside = (reference.tokens[:, : len(prefix)] == torch.tensor(prefix)).all(1)
    mine = reference.logprobs[inside]
    total = (mine + scores[inside] / BETA).logsumexp(0) - mine.logsumexp(0)
    return BETA * total.item()


def prefixes() -> list[tuple[int, ...]]:
    """What a response of the tabular language may be so far, as tokens."""
    letters = range(2, 2 + len(LETTERS))
    return [word for n in range(MOST_LETTERS + 1) for word in product(letters, repeat=n)]


def row_of(prompt: str, prefix: Sequence[int]) -> int:
    """Where the table of a tabular model has this prefix."""
    tokens = (VOCABULARY.index(prompt), *prefix)
    return sum(token * len(VOCABULARY) ** i for i, token in enumerate(tokens))


def save_optimum(folder: Path, reference: Path) -> tuple[Path, Path]:
    """pi* as a policy and its soft values as a critic, each in a folder of its own."""
    policy = AutoModelForCausalLM.from_pretrained(reference)
    critic = TabularForSequenceClassification(TabularConfig(num_labels=1))
    nn.init.zeros_(critic.model.table.weight)
    critic.score.weight.data = F.one_hot(torch.tensor([0]), len(VOCABULARY) + 2).float()
    for prompt in PROMPTS:
        found = exact(policy, prompt, most_tokens=MOST_LETTERS + 1)
        best, _ = optimum(found, prompt)
        for prefix in prefixes():
            row = row_of(prompt, prefix)
            critic.model.table.weight.data[row, 0] = soft_value(found, prompt, prefix)
            for token in range(len(VOCABULARY)) if len(prefix) < MOST_LETTERS else ():
                whole = torch.tensor((*prefix, token))
                inside = (found.tokens[:, : len(whole)] == whole).all(1)
                mass = best[inside].logsumexp(0) if inside.any() else torch.tensor(NEVER)
                policy.model.table.weight.data[row, token] = mass.clamp(min=NEVER)
    for name, model in (("policy", policy), ("critic", critic)):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder / "policy", folder / "critic"


def kl(logp: Tensor, logq: Tensor) -> float:
    """KL(p || q) in nats; what p never says costs nothing."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum().item()
