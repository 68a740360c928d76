"""The tiny suite's base model, made from shipped text by `tiny/base` and `tiny/base2`.

    python tools/tiny_model.py init     FOLDER        a tokenizer and a config, no weights
    python tools/tiny_model.py exchange FILE          pairs for tiny/base2, words exchanged
    python tools/tiny_model.py finish   FROM TO       weights as float16, small enough to ship

A byte-level BPE of 2,048 tokens trained on data/kjv_web/base.jsonl.gz, and a Llama of 4.5 million
parameters.

A model that is shown the same 18,000 verses again learns them by heart and spells a name that it
has not met by guessing. In `exchange`'s pairs a word that both texts share may be another one, the
same in both, so that the only way to write it is to copy it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

TEXT = Path(__file__).parent.parent / "data" / "kjv_web" / "base.jsonl.gz"
EOS, PAD = "<|endoftext|>", "<|pad|>"
WORD = re.compile(r"[A-Za-z]{3,}")
NUM_PASSES = 2
SEED = 7
UNTOUCHED = 0.4
"""Share of the pairs that stay as they are."""
INVENTED = 0.2
"""Share of the exchanged words that are halves of two words put together."""


def read_texts() -> list[str]:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def init(folder: str) -> None:
    texts = read_texts()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[EOS, PAD])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)


def write_exchanged(path: str) -> None:
    """``NUM_PASSES`` passes over the verse pairs, as prompt and completion, words exchanged."""
    rng = random.Random(SEED)
    texts = read_texts()
    words = sorted({word for text in texts for word in WORD.findall(text)})
    pools = [[w for w in words if w[0].isupper() == upper] for upper in (False, True)]
    with Path(path).open("w", encoding="utf-8") as file:
        for _ in range(NUM_PASSES):
            for text in rng.sample(texts, len(texts)):
                prompt, completion = exchange(text, pools, rng).split("\n")
                row = {"prompt": f"{prompt}\n", "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def exchange(text: str, pools: list[list[str]], rng: random.Random) -> str:
    """Half of the words that stand once in each of the two lines, exchanged in both alike."""
    if rng.random() < UNTOUCHED:
        return text
    once = [{w for w, n in Counter(WORD.findall(t)).items() if n == 1} for t in text.split("\n")]
    new = {}
    for word in sorted(once[0] & once[1]):
        if rng.random() < 0.5:
            first, second = rng.choices(pools[word[0].isupper()], k=2)
            invented = first[: len(first) // 2] + second[len(second) // 2 :].lower()
            new[word] = invented if rng.random() < INVENTED else first
    return WORD.sub(lambda match: new.get(match[0], match[0]), text)


def finish(source: str, target: str) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("folder")
    commands.add_parser("exchange").add_argument("file")
    finisher = commands.add_parser("finish")
    finisher.add_argument("source")
    finisher.add_argument("target")
    args = parser.parse_args()
    if args.command == "init":
        init(args.folder)
    elif args.command == "exchange":
        write_exchanged(args.file)
    else:
        finish(args.source, args.target)
