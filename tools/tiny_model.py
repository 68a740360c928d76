"""The tiny suite's base model: made from shipped text, in two steps around `align sft tiny/base`.

    python tools/tiny_model.py init   FOLDER          a tokenizer and a config, no weights
    python tools/tiny_model.py finish FROM TO         weights as float16, small enough to ship

A byte-level BPE of 2,048 tokens trained on data/kjv_web/base.jsonl.gz, and a Llama of 4.5 million
parameters.
"""

from __future__ import annotations

import argparse
import gzip
import json
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


def init(folder: str) -> None:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
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


def finish(source: str, target: str) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("folder")
    finisher = commands.add_parser("finish")
    finisher.add_argument("source")
    finisher.add_argument("target")
    args = parser.parse_args()
    if args.command == "init":
        init(args.folder)
    else:
        finish(args.source, args.target)
