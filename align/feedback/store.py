"""Store people's answers in one SQLite file, each on disk before the next pair is shown.

A killed process loses no confirmed answer, and several annotators share one file. Answers are never
deleted: an undone one is marked.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align.types import AlignError

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS responses (
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, text TEXT NOT NULL, model TEXT,
    UNIQUE (prompt, text)
);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, annotator TEXT NOT NULL,
    left INTEGER NOT NULL REFERENCES responses, right INTEGER NOT NULL REFERENCES responses,
    said TEXT NOT NULL CHECK (said IN ('left', 'right', 'tie', 'skip')),
    seconds REAL NOT NULL, at REAL NOT NULL, undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON answers (annotator, min(left, right), max(left, right))
    WHERE undone = 0;
"""
SAID = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Response:
    id: int
    prompt: str  # as JSON: a string, or turns
    text: str
    model: str | None


@dataclass(frozen=True)
class Answer:
    annotator: str
    left: int
    right: int
    said: str

    @property
    def pair(self) -> tuple[int, int]:
        return min(self.left, self.right), max(self.left, self.right)

    def outcome(self) -> float:
        """Outcome for the lower-numbered response of the pair: 1, 0.5 or 0."""
        left = {"left": 1.0, "right": 0.0, "tie": 0.5}[self.said]
        return left if self.left < self.right else 1 - left


class Store:
    """One open file; safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))  # it holds the URL's token
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # FULL: a commit returns when the disk has it
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise AlignError(f"{path}: cannot be opened as a store of answers: {error}") from error
        self._db.execute(
            "INSERT OR IGNORE INTO meta VALUES ('token', ?)", (secrets.token_urlsafe(24),)
        )

    @property
    def token(self) -> str:
        """Random token, fixed for the life of the file, so that an open page works after a
        crash.
        """
        (value,) = self._db.execute("SELECT value FROM meta WHERE key = 'token'").fetchone()
        return str(value)

    @property
    def port(self) -> int | None:
        """Port that the file was last served at, so that an open page finds it again."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'port'").fetchone()
        return int(row[0]) if row else None

    @port.setter
    def port(self, number: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('port', ?)", (str(number),))

    @contextmanager
    def served_alone(self) -> Iterator[None]:
        """Refuse a second server on one file, which would show pairs already answered."""
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise AlignError(
                f"{self.path}: another `align label` serves it; use its page, or end it first"
            ) from error
        except OSError as error:
            raise AlignError(f"{self.path}.lock: cannot be made: {error.strerror}") from error
        with lock:
            yield

    def add_responses(self, rows: Sequence[tuple[Any, str, str | None]]) -> int:
        """Add (prompt, text, model) of each response; existing ones are kept."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            before = self._count("responses")
            self._db.executemany(
                "INSERT OR IGNORE INTO responses (prompt, text, model) VALUES (?, ?, ?)",
                [(json.dumps(prompt, ensure_ascii=False), text, m) for prompt, text, m in rows],
            )
            return self._count("responses") - before

    def responses(self) -> list[Response]:
        rows = self._db.execute("SELECT id, prompt, text, model FROM responses ORDER BY id")
        return [Response(*row) for row in rows]

    def answers(self) -> list[Answer]:
        """List all answers that are not undone, oldest first, skips included."""
        with self._lock:
            rows = self._db.execute(
                "SELECT annotator, left, right, said FROM answers WHERE undone = 0 ORDER BY id"
            ).fetchall()
        return [Answer(*row) for row in rows]

    def add_answer(self, answer: Answer, *, seconds: float) -> bool:
        """Write one answer to disk; False if this annotator had answered already."""
        values = (answer.annotator, answer.left, answer.right, answer.said, seconds, time.time())
        with self._lock:
            try:
                self._db.execute(
                    "INSERT INTO answers (annotator, left, right, said, seconds, at)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    values,
                )
            except sqlite3.IntegrityError as error:
                if "UNIQUE" not in str(error):
                    raise
                return False
        return True

    def undo(self, annotator: str) -> Answer | None:
        """Undo this annotator's last answer."""
        with self._lock:
            row = self._db.execute(
                "SELECT id, annotator, left, right, said FROM answers"
                " WHERE annotator = ? AND undone = 0 ORDER BY id DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if row is None:
                return None
            self._db.execute("UPDATE answers SET undone = 1 WHERE id = ?", row[:1])
        return Answer(*row[1:])

    def judgements(self) -> list[dict[str, Any]]:
        """List rows for ``align data rank``, without skips."""
        by_id = {response.id: response for response in self.responses()}
        winners = {"left": "a", "right": "b", "tie": "tie"}
        rows = []
        for answer in self.answers():
            if answer.said == "skip":
                continue
            a, b = by_id[answer.left], by_id[answer.right]
            row = {
                "prompt": json.loads(a.prompt),
                "a": a.text,
                "b": b.text,
                "winner": winners[answer.said],
                "annotator": answer.annotator,
            }
            if a.model and b.model:
                row |= {"model_a": a.model, "model_b": b.model}
            rows.append(row)
        return rows

    def _count(self, name: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
