"""The console script ``align``: reads the arguments, finds the stage, prints errors as one line.

torch and transformers are imported inside a command, so that ``align ls``, ``align --help`` and a
misspelt command answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from align import __version__
from align.base import libraries
from align.base.console import complain, say, say_traceback
from align.base.suggest import suggest
from align.commands import data, doctor, label
from align.stages import STAGES, names_of, recipe_classes, run_stage

OTHERS = ("ls", "cp", "check", "doctor", "data", "label", "report", "sweep")

EPILOG = """\
RECIPE is a YAML file or a shipped name (`align ls`); key=value changes one of its keys:
  align sft tiny/sft
  align sft tiny/sft data=my.jsonl train.epochs=2 output_dir=runs/mine
"""


KEYS = """\
Keys of the recipe, with default, range and unit; a round bracket leaves the end
of a range out. On the command line, optim.lr=1e-5 sets `lr` of section `optim`.
"""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block in front of its error; a stage's help lists its keys."""

    recipe: type | None = None

    def format_help(self) -> str:
        text = super().format_help()
        if self.recipe is None:
            return text
        from align.config.describe import help_text

        width = min(shutil.get_terminal_size().columns, 100)
        return f"{text}\n{KEYS}\n{help_text(self.recipe, width)}\n"

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '(.*?)' \(choose from", message)
        if unknown and "COMMAND" in message:
            commands = [*STAGES, *OTHERS]
            near = suggest(unknown[1], commands)
            hint = f"; did you mean {near}?" if near else f"; there are {', '.join(commands)}"
            message = f"{unknown[1]}: no such command{hint}"
        complain(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, 1 internal error (or what `doctor` and `data check` found), 2 user's error, 129 SIGHUP,
    130 Ctrl-C, 143 SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    args = _parse([a for a in arguments if a != "--debug"])
    libraries.set_up(quiet=True)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        if debug:
            say_traceback()
        complain(str(interrupt) or "interrupted")
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except BrokenPipeError:  # `align ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            say_traceback()
        line, code = _explain(error)
        complain(line)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    from align.types import AlignError

    text = " ".join(str(error).split())
    if isinstance(error, AlignError):
        return text, 2
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or text}", 2
    # by name: torch is not imported for the sake of a message
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator" in text:
        return f"out of memory: {text[:120]}; lower tokens_per_microbatch or data.max_tokens", 2
    kind = type(error).__name__
    return f"internal error: {kind}: {text[:300]}; rerun with --debug for the traceback", 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ``key=value`` may stand behind an option, where argparse has no place
    for it."""
    parser = _parser()
    args, left = parser.parse_known_args(arguments)
    takes_keys = hasattr(args, "overrides") and all(re.match(r"[\w.-]+=", a) for a in left)
    if left and (not takes_keys or any(a.startswith("-") for a in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="align",
        description="SFT, reward modelling, PPO and DPO; every command takes a YAML recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks (anywhere)")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser
    )
    for name, stage in STAGES.items():
        command = commands.add_parser(
            name, help=stage.help, description=stage.help, allow_abbrev=False
        )
        command.recipe = stage.recipe
        _add_recipe_arguments(command)
        command.set_defaults(run=run_recipe)
    ls = commands.add_parser("ls", help="list the shipped recipes")
    ls.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name")
    ls.set_defaults(run=run_ls)
    cp = commands.add_parser("cp", help="copy a shipped recipe, to change it")
    cp.add_argument("name", metavar="NAME")
    cp.add_argument("dest", metavar="DEST", help="a file or a folder")
    cp.set_defaults(run=run_cp)
    report = commands.add_parser("report", help="one page about runs, or live in the terminal")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one of several")
    report.add_argument(
        "--output", default="report.html", metavar="FILE", help="the page (default: report.html)"
    )
    report.add_argument(
        "--follow", action="store_true", help="show the numbers of running runs here instead"
    )
    report.set_defaults(run=run_report)
    sweep = commands.add_parser("sweep", help="a recipe over several values of a key; resumable")
    sweep.add_argument("stage", choices=[*names_of(lambda stage: stage.resumable)])
    _add_recipe_arguments(sweep)
    sweep.add_argument(
        "--over", action="append", required=True, metavar="KEY=A,B,C", help="such as kl.coef=.1,.3"
    )
    sweep.add_argument(
        "--eval", metavar="RECIPE", help="an evaluation; every model of the sweep is added to it"
    )
    sweep.set_defaults(run=run_sweep)
    check = commands.add_parser("check", help="validate a recipe and print what will run")
    _add_recipe_arguments(check)
    check.add_argument(
        "--stage", choices=list(STAGES), help="its command, where the file's name does not say it"
    )
    check.set_defaults(run=run_check)
    doctor.add_parser(commands)
    data.add_parser(commands)
    label.add_parser(commands)
    return parser


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped name")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as train.epochs=2"
    )


# ---------------------------------------------------------------- commands


def run_recipe(args: argparse.Namespace) -> None:
    from align.base import threads
    from align.config.load import load_recipe

    load = threads.read_load()
    stage = STAGES[args.command]
    recipe: Any = load_recipe(stage.recipe, args.recipe, args.overrides, others=recipe_classes())
    threads.choose_wait_policy(load, os.environ)
    run_stage(stage, recipe)


def run_ls(args: argparse.Namespace) -> None:
    from align.config.load import first_comment, shipped_recipes
    from align.types import AlignError

    found = {n: p for n, p in shipped_recipes().items() if args.pattern in n}
    if not found:
        raise AlignError(
            f"{args.pattern!r}: no shipped recipe has this in its name; try `align ls`"
        )
    width = max(map(len, found))
    for name, path in found.items():
        say(f"{name:<{width}}  {first_comment(path)}".rstrip())


def run_cp(args: argparse.Namespace) -> None:
    from align.base.files import require_writable, write_whole
    from align.config.load import find_recipe
    from align.types import AlignError

    source = find_recipe(args.name)
    dest = Path(args.dest)
    if dest.is_dir():
        dest = dest / source.name
    if dest.exists():
        raise AlignError(f"{dest}: exists already; choose another name or remove it first")
    require_writable(dest)
    write_whole(dest, source.read_bytes(), new=True)
    say(f"{dest}: copied from {args.name}; change it, then `align check {dest}`")


def run_report(args: argparse.Namespace) -> None:
    if args.follow:
        from align.report.follow import follow
        from align.report.runs import find_runs

        follow(find_runs(args.runs))
        return
    from align.report.page import write_report

    say(f"{write_report(args.runs, args.output)}: written; open it in a browser")


def run_sweep(args: argparse.Namespace) -> None:
    from align.base import threads

    threads.choose_wait_policy(threads.read_load(), os.environ)
    from align.commands.sweep import sweep

    sweep(STAGES[args.stage], args.recipe, args.overrides, over=args.over, evaluate=args.eval)


def run_check(args: argparse.Namespace) -> None:
    from align.commands.check import check
    from align.config.load import load_recipe, stage_of
    from align.types import AlignError

    if args.recipe in STAGES and args.overrides and "=" not in args.overrides[0]:
        whole = f"align check {args.overrides[0]} --stage {args.recipe}"
        raise AlignError(f"check: takes the recipe alone; run `{whole}`")
    command = args.stage or stage_of(args.recipe, recipe_classes(), args.overrides)
    recipe: Any = load_recipe(STAGES[command].recipe, args.recipe, args.overrides)
    for line in check(command, recipe):
        say(line)
