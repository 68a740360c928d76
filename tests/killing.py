"""Runs ``align`` commands, each in a process of its own that gets a real signal at a given call.

    python tests/killing.py < commands.json > exit_codes.json

``commands.json`` is a list of ``{"argv": [...], "log": file}``, with ``"at": "module:Class.name"``,
``"call": n``, ``"when": "before" | "after"`` and ``"signal": 9`` where the process is to be hit.
Torch is imported once and every command is a fork, which is what makes dozens of them cheap.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def hit(at: str, call: int, when: str, signal: int) -> None:
    """Send this process ``signal`` at the call-th call (from 1) of a function."""
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call
        if now and when == "before":
            os.kill(os.getpid(), signal)
        result = original(*args, **options)
        if now and when == "after":
            os.kill(os.getpid(), signal)
        return result

    setattr(owner, name, counted)


def run(command: dict[str, Any]) -> int:
    """The exit code that a shell would see, as a negative number for a signal that killed it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 99
    try:
        if "at" in command:
            hit(command["at"], command["call"], command["when"], command["signal"])
        code = main(command["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    from align.base import libraries
    from align.cli import main

    libraries.set_up(quiet=True)
    for stage in ("sft", "reward_model", "dpo", "ppo"):
        importlib.import_module(f"align.stages.{stage}")
    commands = json.load(sys.stdin)
    print(json.dumps([run(command) for command in commands]))
