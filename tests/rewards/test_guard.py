"""Whatever a user's function does, its run goes on unharmed or ends in one line, never as done."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align.base.console import say
from align.rewards import FunctionReward, guard, load_function
from align.types import AlignError

GIVEN = (["p", "q"], ["a", "bb"], [(), ()])


@pytest.fixture(autouse=True)
def nothing_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_told", set())


def reward(act) -> FunctionReward:
    def f(responses):
        act()
        return [float(len(r)) for r in responses]

    return FunctionReward("mine:f", f)


def raising(error: BaseException):
    def act() -> None:
        raise error

    return act


def forked(act: Callable[[], None], folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a child process that does ``act`` and ends with code 0.

    It has descriptors and streams of its own, as a new Python has, without starting one.
    """
    told = [folder / "stdout", folder / "stderr"]
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            for descriptor, path in enumerate(told, start=1):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            act()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # where `os._exit` is still intercepted
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, told[0].read_text("utf-8"), told[1].read_text("utf-8")


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: os._exit(0), r"raised os._exit\(0\) \(it would have ended the run\)"),
        (lambda: sys.modules["posix"]._exit(0), r"raised os._exit\(0\)"),
        (lambda: os.abort(), r"raised os.abort\(\)"),
        (lambda: os.execv(sys.executable, ["x"]), r"raised os.execv"),
        (lambda: sys.exit(), "raised SystemExit"),
        (lambda: sys.exit(0), "raised SystemExit: 0"),
        (raising(GeneratorExit()), "raised GeneratorExit;"),
        (raising(KeyboardInterrupt()), "raised KeyboardInterrupt;"),
        (raising(BaseException("own")), "raised BaseException: own"),
        (raising(ValueError("a\x1b[31m\nb")), r"raised ValueError: a\\u001b\[31m b;"),
        (raising(ValueError("x" * 9999)), "raised ValueError: x{300}…;"),
        (raising(type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})()), "raised Odd;"),
    ],
)
def test_every_way_out_is_one_line(act, told: str) -> None:
    with pytest.raises(AlignError, match=f"^reward function mine:f: {told}") as caught:
        reward(act)(*GIVEN)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


def test_a_child_process_of_the_function_may_exit() -> None:
    def act() -> None:
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    assert reward(act)(*GIVEN) == [1.0, 2.0]


def test_outside_a_call_the_process_may_exit(tmp_path: Path) -> None:
    """The interception is gone with the call: `os._exit` is then the system's."""

    def act() -> None:
        FunctionReward("f", lambda responses: [0.0])(["p"], ["r"], [()])
        os._exit(9)

    assert forked(act, tmp_path) == (9, "", "")


def test_after_a_timeout_the_process_may_exit_and_the_hung_thread_may_not(tmp_path: Path) -> None:
    go, tried = threading.Event(), threading.Event()

    def hung(responses):
        go.wait()
        try:
            os._exit(3)
        finally:
            tried.set()

    def act() -> None:
        with pytest.raises(AlignError, match="no answer within"):
            FunctionReward("f", hung, timeout=0.05)(["p"], ["r"], [()])
        go.set()
        tried.wait(9)
        os._exit(9)

    code, _, error = forked(act, tmp_path)
    assert code == 9, error


@pytest.mark.parametrize(
    ("what", "change", "read"),
    [
        ("the working directory", lambda: os.chdir("/"), os.getcwd),
        (
            "torch's default dtype",
            lambda: torch.set_default_dtype(torch.float64),
            torch.get_default_dtype,
        ),
        ("", lambda: torch.set_num_threads(2), torch.get_num_threads),
        ("torch's seed", lambda: torch.manual_seed(1), lambda: torch.get_rng_state().tolist()),
        (
            "torch's deterministic mode",
            lambda: torch.use_deterministic_algorithms(True),
            torch.are_deterministic_algorithms_enabled,
        ),
        (
            "torch's precision of products",
            lambda: torch.set_float32_matmul_precision("medium"),
            torch.get_float32_matmul_precision,
        ),
        ("", lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
        ("", lambda: torch.set_default_device("meta"), torch.get_default_device),
    ],
)
def test_what_was_changed_is_put_back_and_said_once(what: str, change, read, capsys) -> None:
    torch.set_num_threads(1)
    before = read()
    for _ in range(2):
        assert reward(change)(*GIVEN) == [1.0, 2.0]
        assert read() == before
    told = f"align: warning: reward function mine:f: changed {what}; it was put back\n"
    assert capsys.readouterr().err == (told if what else "")


def test_it_is_put_back_where_the_function_fails_too() -> None:
    def act() -> None:
        torch.set_default_dtype(torch.float64)
        raise ValueError

    with pytest.raises(AlignError):
        reward(act)(*GIVEN)
    assert torch.get_default_dtype() == torch.float32


def test_a_function_that_draws_random_numbers_goes_on_drawing() -> None:
    """Only a new seed is taken back: two calls are not given the same noise."""
    drawn = FunctionReward("noise", lambda responses: torch.rand(len(responses)))
    assert drawn(*GIVEN) != drawn(*GIVEN)


def test_what_a_module_changes_when_it_is_imported_is_put_back(tmp_path, monkeypatch, capsys):
    (tmp_path / "rash_rewards.py").write_text(
        "import signal, torch, os\n"
        "torch.set_grad_enabled(False)\ntorch.set_default_device('meta')\n"
        "torch.set_default_dtype(torch.bfloat16)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "def f(responses): return [0.0] * len(responses)\n"
    )
    (tmp_path / "exiting_rewards.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "leaving_rewards.py").write_text("from os import _exit\n_exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    load_function("rash_rewards:f")
    assert torch.is_grad_enabled()
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "module rash_rewards: changed torch's default dtype" in capsys.readouterr().err
    for name, told in (("exiting", "SystemExit: 0"), ("leaving", r"os._exit\(0\)")):
        with pytest.raises(AlignError, match=f"importing {name}_rewards raised {told}"):
            load_function(f"{name}_rewards:f")


def close_stdout() -> None:
    sys.stdout = None


@pytest.mark.parametrize(
    "close",
    [
        lambda: sys.stdout.close(),
        lambda: os.close(1),
        lambda: os.dup2(os.open(os.devnull, 1), 1),
        close_stdout,
    ],
    ids=["close", "close its descriptor", "devnull in its place", "None"],
)
def test_a_closed_terminal_is_opened_again(close: Callable[[], object], tmp_path: Path) -> None:
    def f(responses):
        close()
        return [0.0]

    def act() -> None:
        say("before")
        FunctionReward("f", f)(["p"], ["r"], [()])
        Path("metrics").write_text("not for the terminal")
        say("after")

    code, out, error = forked(act, tmp_path)
    assert (code, out) == (0, "before\nafter\n"), error
    assert "changed stdout or stderr; it was put back" in error
