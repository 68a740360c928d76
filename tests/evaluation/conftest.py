"""Two made-up systems over the same prompts, and references that differ in number."""

from __future__ import annotations

import random

import pytest

WORDS = [
    "and",
    "the",
    "king",
    "of",
    "Israel",
    "said",
    "unto",
    "his",
    "servants",
    "go",
    "ye",
    "up",
    "to",
    "the",
    "city",
    "behold",
    "it",
    "is",
    "good",
]


def corrupt(text: str, rate: float, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) if rng.random() < rate else word for word in text.split())


@pytest.fixture(scope="session")
def references() -> list[list[str]]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) + "." for _ in range(60)]
    return [
        [text] if row % 3 else [text, corrupt(text, 0.2, rng)] for row, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def systems(references: list[list[str]]) -> dict[str, list[str]]:
    """``good`` and ``fair`` are about equal, ``poor`` is worse."""
    rng = random.Random(1)
    rates = {"good": 0.20, "fair": 0.22, "poor": 0.5}
    return {
        name: [corrupt(row[0], rate, rng) for row in references] for name, rate in rates.items()
    }
