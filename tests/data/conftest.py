"""A tiny byte-level BPE trained on shipped text, with and without a chat template and BOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SHIPPED = Path(__file__).parents[2] / "data" / "kjv_web"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (SHIPPED / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator((json.loads(line)["source_text"] for line in lines), trainer)
    return tokenizer


MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def make_tokenizer(bpe: Tokenizer) -> MakeTokenizer:
    """``specials`` is what the tokenizer puts around every text: ``<s> $A`` is a BOS."""

    def make(
        *, template: str | None = None, specials: str | None = None, eos: str = "</s>", **more: str
    ) -> PreTrainedTokenizerFast:
        raw = Tokenizer.from_str(bpe.to_str())
        if specials:
            ids = [(t, raw.token_to_id(t)) for t in ("<s>", "</s>") if t in specials]
            raw.post_processor = processors.TemplateProcessing(single=specials, special_tokens=ids)
        tokens = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>", **more}
        return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **tokens)

    return make


@pytest.fixture
def plain(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(specials="<s> $A")


@pytest.fixture
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(template=CHATML, eos="<|im_end|>")
