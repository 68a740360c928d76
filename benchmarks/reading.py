"""CPU time of reading and tokenising a row, beside another checkout's in the same process.

    python -m benchmarks.reading                        # this checkout alone
    python -m benchmarks.reading --against FOLDER       # and that of FOLDER, in turn

Both read the same files and use the same tokenizer on one core. A figure is the least of several
rounds, in CPU time, because other processes of the machine only ever add to it.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer

from benchmarks.data import SOURCE, write_jsonl

ROOT = Path(__file__).parents[1]
ROWS = 1200
TOKENISED = 60
"""Rows that are tokenised, the first ones: it takes a hundred times as long as reading them."""
ROUNDS = 7
SECONDS = 0.1
"""Time that a figure is measured over at least, in each round."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Measured = dict[str, tuple[Callable[[], Any], int]]
"""Name of a figure -> what is measured, and of how many rows."""


def rows_of(words: list[str], turns: int) -> Iterator[dict[str, Any]]:
    """Yield rows of ``turns`` turns of 10 to 60 words; 0 = a preference pair of strings."""
    rng = np.random.default_rng(turns)

    def text() -> str:
        start = rng.integers(len(words) - 60)
        return " ".join(words[start : start + rng.integers(10, 61)])

    for _ in range(ROWS):
        if turns:
            roles = ("user", "assistant")
            yield {"messages": [{"role": roles[k % 2], "content": text()} for k in range(turns)]}
        else:
            yield {"prompt": text(), "chosen": text(), "rejected": text()}


def tokenizers(model: str) -> dict[str, Any]:
    """Load the model's tokenizer with ChatML, whose tags are special tokens or text.

    With tags that are text, EOS is appended to each answer, so that each is a sequence of its own.
    """
    made = {}
    for name in ("special", "text"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = TEMPLATE
        tokenizer.model_max_length = 10**9
        if name == "special":
            tags = [AddedToken(tag, special=True) for tag in ("<|im_start|>", "<|im_end|>")]
            tokenizer.add_special_tokens({"additional_special_tokens": tags})
        made[name] = tokenizer
    return made


def load_checkout(folder: Path) -> dict[str, Any]:
    """Import functions of a checkout's ``align``; another's leaves ``sys.modules``."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "align"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        wanted = ("read_file", "load_examples", "encode_example")
        found = {name: getattr(_module_with(folder, name), name) for name in wanted}
        sections = folder / "align" / "config" / "sections.py"  # older ones have it in types
        module = "align.config.sections" if sections.is_file() else "align.types"
        return found | {"DataSource": importlib.import_module(module).DataSource}
    finally:
        sys.path.remove(str(folder))


def _module_with(folder: Path, function: str) -> ModuleType:
    """Find the module of ``align.data`` that defines a function, wherever the checkout has it."""
    for path in sorted((folder / "align" / "data").rglob("*.py")):
        if f"\ndef {function}(" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(folder).with_suffix("").parts
            return importlib.import_module(".".join(parts))
    raise SystemExit(f"{folder}: align.data has no function {function}; name a checkout of align")


def cases(checkout: dict[str, Any], files: dict[str, Path], made: dict[str, Any]) -> Measured:
    """Make the figures of one checkout."""
    measured: Measured = {}
    for name, path in files.items():
        source = [checkout["DataSource"](path=str(path))]
        kind = "preference" if name == "pair" else "sft"
        read = checkout["read_file"]
        measured[f"read {name}"] = partial(_count, read, path), ROWS
        load = checkout["load_examples"]
        measured[f"load {name}"] = partial(load, source, kind=kind), ROWS
        examples = list(load(source, kind=kind).examples)[:TOKENISED]
        for tags, tokenizer in made.items() if name != "pair" else [("text", made["text"])]:
            encode = checkout["encode_example"]
            label = f"tokenise {name}" + (f", tags are {tags}" if name != "pair" else "")
            measured[label] = partial(_encode_all, encode, tokenizer, examples), len(examples)
    return measured


def _count(read: Callable[[Path], Iterable[Any]], path: Path) -> int:
    return sum(1 for _ in read(path))


def _encode_all(encode: Callable[..., Any], tokenizer: Any, examples: Iterable[Any]) -> list[Any]:
    return [encode(tokenizer, example) for example in examples]


def least_microseconds(sides: list[Measured], name: str) -> list[float]:
    """CPU time a row of each side, in turn, the least of `ROUNDS`."""
    start = time.thread_time()
    for side in sides:
        side[name][0]()
    times = 1 + int(len(sides) * SECONDS / max(time.thread_time() - start, 1e-6))
    least = [float("inf")] * len(sides)
    for _ in range(ROUNDS):
        for number, side in enumerate(sides):
            act, rows = side[name]
            start = time.thread_time()
            for _ in range(times):
                act()
            passed = (time.thread_time() - start) / times / rows * 1e6
            least[number] = min(least[number], passed)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny"), help="a tokenizer")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with gzip.open(SOURCE, "rt", encoding="utf-8") as file:
        words = " ".join(json.loads(line)["text"] for line in file).split()
    made = tokenizers(args.model)
    folders = [args.against, ROOT] if args.against else [ROOT]
    with tempfile.TemporaryDirectory() as place:
        files = {n: Path(place) / f"{n}.jsonl" for n in ("pair", "2 turns", "20 turns")}
        for path, turns in zip(files.values(), (0, 2, 20), strict=True):
            write_jsonl(path, rows_of(words, turns))
        sides = [cases(load_checkout(folder.resolve()), files, made) for folder in folders]
        gc.collect()
        gc.freeze()  # else collections go through the rows of all sides
        print(f"{'us a row':34}" + "".join(f"{folder.name:>12}" for folder in folders))
        for name in sides[-1]:
            found = least_microseconds(sides, name)
            ratio = f"{found[-1] / found[0]:9.2f}" if len(found) > 1 else ""
            print(f"{name:34}" + "".join(f"{micro:12.1f}" for micro in found) + ratio)


if __name__ == "__main__":
    main()
