"""Human ratings of movie snippets -> demonstrations and preference pairs in runs/sentiment/data.

    make sentiment-data

The ratings are those of Hutto and Gilbert 2014 (VADER, ICWSM), in the source package of
vaderSentiment 3.3.2 on PyPI: 10,605 snippets of film reviews, each rated from -4 to 4 by 15 people
or more. The text is third-party and is not part of this repository; ``make`` fetches it.

The first two words of a snippet are the prompt, and the rest is the response. Two snippets with one
prompt are a pair if their mean ratings differ by a point or more; the margin is that difference.
Prompts are split into training and held out by a hash, so that no prompt is on both sides.

``data.make_sentiment:vader`` is VADER's own score as a reward, to measure beside a trained one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

SOURCE = Path("runs/downloads/vaderSentiment-3.3.2")
RATINGS = "additional_resources/hutto_ICWSM_2014.tar.gz"
OUT = Path("runs/sentiment/data")
PROMPT_WORDS = 2
LEAST_WORDS = 3  # of a response
LEAST_GAP = 1.0  # points of mean rating, -4 to 4
PAIRS_PER_SNIPPET = 4
TEST_SHARE = 0.15  # of the prompts


@dataclass(frozen=True)
class Snippet:
    prompt: str
    response: str
    rating: float  # mean, -4 to 4
    ratings: tuple[int, ...]


def read_snippets(archive: Path) -> list[Snippet]:
    """Those that are long enough for a prompt and a response."""
    with tarfile.open(archive) as tar:
        texts, ratings = (
            _lines(tar, f"hutto_ICWSM_2014/movieReviewSnippets_{name}.txt")
            for name in ("GroundTruth", "anonDataRatings")
        )
    given = {row[0]: tuple(ast.literal_eval(row[3])) for row in ratings}
    snippets = []
    for number, rating, text in texts:
        words = text.split()
        if len(words) >= PROMPT_WORDS + LEAST_WORDS:
            prompt = " ".join(words[:PROMPT_WORDS])
            rest = " " + " ".join(words[PROMPT_WORDS:])
            snippets.append(Snippet(prompt, rest, float(rating), given[number]))
    return snippets


def _lines(tar: tarfile.TarFile, name: str) -> list[list[str]]:
    stream = tar.extractfile(name)
    if stream is None:
        raise SystemExit(f"{name} is not in the archive")
    lines = stream.read().decode("utf-8").splitlines()
    return [line.split("\t") for line in lines if line.strip()]


def is_test(prompt: str) -> bool:
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def make_pairs(snippets: Sequence[Snippet], seed: int = 0) -> list[tuple[Snippet, Snippet]]:
    """(better, worse) of one prompt, no snippet in more than a few pairs."""
    by_prompt: dict[str, list[Snippet]] = defaultdict(list)
    for snippet in snippets:
        by_prompt[snippet.prompt].append(snippet)
    pairs = []
    rng = random.Random(seed)
    for same in by_prompt.values():
        used: dict[str, int] = defaultdict(int)
        candidates = list(combinations(same, 2))
        rng.shuffle(candidates)
        for a, b in candidates:
            better, worse = (a, b) if a.rating > b.rating else (b, a)
            rested = max(used[a.response], used[b.response]) < PAIRS_PER_SNIPPET
            if rested and better.rating - worse.rating >= LEAST_GAP:
                used[a.response] += 1
                used[b.response] += 1
                pairs.append((better, worse))
    return pairs


# ---------------------------------------------------------------- VADER, and what people agree on


@cache
def analyzer() -> Any:
    """VADER from the fetched source, without installing it."""
    path = SOURCE / "vaderSentiment" / "vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("vaderSentiment.vaderSentiment", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path}; run `make sentiment-data`")
    module = importlib.util.module_from_spec(spec)
    sys.modules["vaderSentiment.vaderSentiment"] = module
    spec.loader.exec_module(module)
    return module.SentimentIntensityAnalyzer()


def vader(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """VADER's compound score of the whole snippet, -1 to 1."""
    return [
        analyzer().polarity_scores(prompt + response)["compound"]
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def accuracies(pairs: Sequence[tuple[Snippet, Snippet]], seed: int = 0) -> dict[str, float]:
    """How often each judge prefers the snippet that people rate higher; an equal score is half."""
    rng = random.Random(seed)

    def share(scores: list[tuple[float, float]]) -> float:
        return sum((a > b) + 0.5 * (a == b) for a, b in scores) / len(scores)

    def of_vader(s: Snippet) -> float:
        return vader([s.prompt], [s.response], [()])[0]

    return {
        "VADER": share([(of_vader(a), of_vader(b)) for a, b in pairs]),
        "the longer one": share([(len(a.response), len(b.response)) for a, b in pairs]),
        "one rater of each": share(
            [(rng.choice(a.ratings), rng.choice(b.ratings)) for a, b in pairs]
        ),
    }


# ---------------------------------------------------------------- files


def main() -> None:
    snippets = read_snippets(SOURCE / RATINGS)
    OUT.mkdir(parents=True, exist_ok=True)
    for side, test in (("train", False), ("test", True)):
        mine = [s for s in snippets if is_test(s.prompt) == test]
        pairs = make_pairs(mine)
        rows = {
            "sft": [{"prompt": s.prompt, "completion": s.response} for s in mine],
            "pairs": [
                {
                    "prompt": better.prompt,
                    "chosen": better.response,
                    "rejected": worse.response,
                    "margin": round(better.rating - worse.rating, 4),
                }
                for better, worse in pairs
            ],
            "prompts": [{"prompt": prompt} for prompt in dict.fromkeys(s.prompt for s in mine)],
        }
        for name, written in rows.items():
            path = OUT / f"{name}_{side}.jsonl"
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in written)
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path}: {len(written)} rows")
    print(f"right on the {len(pairs)} held-out pairs:")
    for judge, share in accuracies(pairs).items():
        print(f"  {judge:<18} {share:.1%}")


if __name__ == "__main__":
    main()
