"""Save checkpoints, resume from the newest whole one, and answer signals with a checkpoint.

SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C are noted and answered between two steps: the
run saves a checkpoint and exits. A block that changes no state, such as PPO's sampling or an
evaluation, is interrupted at once (`interruptible`). A second signal exits at once, without saving.
A checkpoint is restored exactly or refused.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from align.base.files import free_in, in_words
from align.base.progress import say, warn
from align.run.folder import Run
from align.training.checkpoint import (
    Trained,
    checkpoints,
    damage,
    load_checkpoint,
    places,
    read_state,
    save_checkpoint,
    set_aside,
    size_of,
)
from align.training.distributed import sum_over_processes
from align.types import AlignError, Interrupted

BETTER_WHEN_LOWER = {"loss": True, "accuracy": False, "score": False}
"""Held-out numbers that may choose the best checkpoint."""

HANGUP = getattr(signal, "SIGHUP", None)
"""Signal of a closed terminal; not on Windows."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))


class _Abandoned(Interrupted):
    """A signal came inside an `interruptible` block; ``step`` and ``state`` are those of its start.

    `Saver.__exit__` turns it into a checkpoint.
    """

    def __init__(self, number: int, step: int, state: Mapping[str, Any] | None) -> None:
        super().__init__(number, "interrupted")
        self.step, self.state = step, state


class Saver:
    """The checkpoints of one run; as a context manager it handles signals.

    Args:
        trained: Name of a role -> its model and optimizer.
        keep: How many of the newest checkpoints to keep.
        best_by: A key of ``BETTER_WHEN_LOWER``: the checkpoint that is best by it is kept too.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        trained: Trained,
        *,
        keep: int,
        best_by: str | None,
    ) -> None:
        self.run, self.accelerator, self.trained = run, accelerator, trained
        self.keep, self.best_by = keep, best_by
        self.folder = run.folder / "checkpoints"
        # {"step": of the best checkpoint, "value": its held-out number, "held_out": all of them}
        self.best: dict[str, Any] | None = None
        self._signal = 0
        # step and state to save if a signal comes now; None where it is only noted
        self._unchanged: tuple[int, Mapping[str, Any] | None] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Saver:
        for number in SIGNALS:
            if number == HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # `nohup`: the run outlives its terminal
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: whoever started it handles signals
                pass
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, _Abandoned):
                self._save_and_exit(error.number, error.step, error.state)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == HANGUP:
            return  # the shell and the system both send it, and a logout sends it behind SIGTERM
        if self._signal and self._signal != HANGUP:
            raise Interrupted(number, "interrupted twice; left at once, without saving")
        self._signal = number
        if self.run.is_main:
            with suppress(RuntimeError):  # in the middle of another line
                warn(f"{self.run.stage}: told to stop; saving as soon as possible (again: at once)")
        self._abandon_block()

    @contextmanager
    def interruptible(self, step: int, state: Mapping[str, Any] | None) -> Iterator[None]:
        """Let a signal end a block that changes nothing of what a checkpoint holds.

        One process leaves the block at once; several finish it, because each waits for the others.
        The checkpoint is that of the block's start.

        Args:
            step: Steps done before the block.
            state: As for `save`; None before the first step, where nothing is to be saved.

        Raises:
            Interrupted: A signal came; the checkpoint is saved.
        """
        if self.accelerator.num_processes == 1:
            self._unchanged = (step, state)
        try:
            if self._signal:
                self._abandon_block()
            yield
        finally:
            self._unchanged = None
        number = self._agreed_signal()
        if number:
            self._save_and_exit(number, step, state)

    def _abandon_block(self) -> None:
        if self._unchanged is not None:
            raise _Abandoned(self._signal, *self._unchanged)

    # ------------------------------------------------------------ resuming

    def resume(self, wanted: bool) -> dict[str, Any] | None:
        """Load the newest whole checkpoint and return its state; None where the run is new.

        Newer ones that are damaged are renamed, not removed.

        Raises:
            AlignError: There are checkpoints, and none is whole.
        """
        if self.run.is_main:
            self._warn_of_little_room()
        place, damaged = self._newest_whole() if wanted else (None, {})
        self.run.require_unfinished()
        if place is None:
            self.run.begin()
            self.run.rewind({})
            return None
        with self._all_refuse():
            state = read_state(place)
            self.run.require_rows(state, place)
            self.run.resume()
        for newer, problem in damaged.items() if self.run.is_main else ():
            aside = set_aside(newer)
            warn(f"resume: {problem}; kept as {aside.name}, going on from {place.name}")
        if "run" not in state and self.run.is_main:
            warn(f"resume: {place}: an older align saved it without checksums: not verified")
        self.accelerator.wait_for_everyone()
        state = load_checkpoint(place, self.trained)
        self.best = state["best"]
        self.run.rewind(state)
        if self.run.is_main:
            say(f"{self.run.stage}: resumed from {place} ({state['step']} steps done)")
        return state

    @contextmanager
    def _all_refuse(self) -> Iterator[None]:
        """Raise in all processes what one raises: the others would wait for it without end."""
        refused: AlignError | None = None
        try:
            yield
        except AlignError as error:
            refused = error
        if self._on_any_rank(refused is not None):
            raise refused or AlignError("resume: another process refuses; its line says why")

    def _warn_of_little_room(self) -> None:
        """Warn before hours of work that the disk has no room for a checkpoint."""
        needs, found = size_of(self.trained), free_in(self.folder)
        if found is not None and found[0] < needs:
            warn(
                f"{self.folder}: a checkpoint needs about {in_words(needs)}, and "
                f"{in_words(found[0])} are free in {found[1]}; make room"
            )

    def _newest_whole(self) -> tuple[Path | None, dict[Path, str]]:
        """Find the newest checkpoint that every rank can read, and the damage of newer ones."""
        damaged: dict[Path, str] = {}
        # one rank's list for all: each has to ask as often as the others
        listed = [places(self.folder)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(listed)
        for place in reversed(listed[0]):
            problem = self._damage(place, self.run.previous_id)
            if not self._on_any_rank(bool(problem)):
                return place, damaged
            damaged[place] = problem or f"checkpoint {place}: another process cannot read it"
        if damaged:
            raise AlignError(
                f"resume: {next(iter(damaged.values()))}; no other checkpoint is whole; start anew "
                "with overwrite=true"
            )
        return None, {}

    def _damage(self, place: Path, run: str | None) -> str:
        """Compare hashes and the run on one rank: the others would read the same bytes again."""
        return damage(place, self.trained, run=run, compare=self.run.is_main)

    # ------------------------------------------------------------ saving

    def save(
        self, step: int, state: Mapping[str, Any], held_out: Mapping[str, float] | None = None
    ) -> None:
        """Save a checkpoint of the state after ``step``, where ``held_out`` was measured."""
        if self.best_by and held_out and self._beats(held_out[self.best_by]):
            value = held_out[self.best_by]
            self.best = {"step": step, "value": value, "held_out": dict(held_out)}
        self._write(step, state)
        self.accelerator.wait_for_everyone()

    def checkpoint_if_signalled(self, step: int, state: Mapping[str, Any]) -> None:
        """Save a checkpoint of the state after ``step`` and exit, if a signal has come.

        Raises:
            Interrupted: A signal has come.
        """
        number = self._agreed_signal()
        if number:
            self._save_and_exit(number, step, state if step else None)

    def _save_and_exit(self, number: int, step: int, state: Mapping[str, Any] | None) -> NoReturn:
        if state is None:
            raise Interrupted(number, "interrupted before the first step; nothing was to save")
        if [place.name for place in checkpoints(self.folder)[-1:]] != [f"step-{step}"]:
            self._write(step, state)
        self.accelerator.wait_for_everyone()
        raise Interrupted(
            number,
            f"interrupted and saved in {self.folder} ({step} steps done); "
            "the same command with resume=auto goes on from there",
        )

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        also_keep = [] if self.best is None else [int(self.best["step"])]
        save_checkpoint(
            self.folder,
            step,
            self.trained,
            {"run": self.run.id, "best": self.best, **self.run.marks(), **state},
            keep=self.keep,
            also_keep=also_keep,
            write=self.run.is_main,
        )
        if self.run.is_main:
            self.run.keep()

    def _agreed_signal(self) -> int:
        """The signal that came to any rank, the same answer on all of them; 0 where none came."""
        found = self._on_any_rank(bool(self._signal))
        return self._signal or (signal.SIGTERM if found else 0)

    def _on_any_rank(self, here: bool) -> bool:
        """Return True if ``here`` is True on any rank; all ranks must call it."""
        if self.accelerator.num_processes == 1:
            return here
        return bool(sum_over_processes({"here": float(here)}, self.accelerator)["here"])

    # ------------------------------------------------------------ the best

    def require_best(self, key: str, held_out: Mapping[str, float]) -> None:
        """Refuse to compare checkpoints by a number that is not measured."""
        if self.best_by and self.best_by not in held_out:
            there = ", ".join(name for name in BETTER_WHEN_LOWER if name in held_out)
            raise AlignError(
                f"{key}: is {self.best_by}, which is not measured on held-out rows here; "
                + (f"there is {there}" if there else "hold some out: data.test or test_fraction")
            )

    def take_best(self, last: Mapping[str, float]) -> dict[str, float]:
        """Load the best checkpoint's weights, if a better one than the end was saved.

        Args:
            last: Held-out numbers of the end.

        Returns:
            Held-out numbers of the weights that are kept.
        """
        if not self.best_by or self.best is None or self._beats(last.get(self.best_by, math.nan)):
            return dict(last)
        step, value = int(self.best["step"]), self.best["value"]
        place = self.folder / f"step-{step}"
        problem = self._damage(place, self.run.id)
        if self._on_any_rank(bool(problem)):  # the weights of the end are whole, and hours of work
            if self.run.is_main:
                warn(f"the best {problem or place}; the model of the last step is saved instead")
            return dict(last)
        load_checkpoint(place, self.trained)
        self.run.describe(best={"step": step, "value": value})
        if self.run.is_main:
            end = last.get(self.best_by)
            told = "not measured" if end is None else f"{end:.4g}"
            say(f"  kept step {step}: held-out {self.best_by} {value:.4g} there, {told} at the end")
        # an older align saved the one number only
        return dict(self.best.get("held_out", {self.best_by: value}))

    def _beats(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        lower = BETTER_WHEN_LOWER[cast(str, self.best_by)]
        return value <= self.best["value"] if lower else value >= self.best["value"]
