"""The console script: each bad input is one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from align import cli
from align.base import libraries
from align.config import load as recipes_io
from align.config.build import dotted_keys
from align.config.describe import sections
from align.stages import STAGES
from align.types import AlignError

BASE = "model: m\noutput_dir: o\n"


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, with one shipped recipe, and an environment that is put back."""
    shipped = tmp_path / "shipped"
    (shipped / "tiny").mkdir(parents=True)
    (shipped / "tiny" / "sft.yaml").write_text("# Fine-tune.\n" + BASE, encoding="utf-8")
    monkeypatch.setattr(recipes_io, "recipes_root", lambda: shipped)
    monkeypatch.chdir(tmp_path)
    for name, value in {**libraries.FAST, **libraries.LEAN, **libraries.QUIET}.items():
        monkeypatch.setenv(name, value)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sfft", "tiny/sft"], "sfft: no such command; did you mean sft?; see `align --help`"),
        (["sft"], "the following arguments are required: RECIPE; see `align sft --help`"),
        (["sft", "tiny/sft", "--lr", "1"], "unrecognized arguments: --lr 1; see `align --help`"),
        (["sft", "tiny/sftt"], "tiny/sftt: no such recipe; did you mean tiny/sft?"),
        (["sft", "my.yml"], "my.yml: no such recipe; did you mean my.yaml?"),
        (["sft", "my.yaml"], "my.yaml: tran: no such key; did you mean train?"),
        (
            ["sft", "tiny/sft", "train.minibatch=many"],
            "command line: train.minibatch: is 'many'; wanted a whole number",
        ),
        (
            ["check", "tiny/sft", "lora.rank=8"],
            "command line: lora.rank: no such key; did you mean lora.r?",
        ),
        (["ls", "zzz"], "'zzz': no shipped recipe has this in its name; try `align ls`"),
        (
            ["cp", "tiny/sft", "my.yaml"],
            "my.yaml: exists already; choose another name or remove it first",
        ),
        (["check", "latin.yaml"], "latin.yaml: not UTF-8 text; save it as UTF-8"),
        (["check", "tiny"], "tiny: no such recipe; did you mean tiny/sft?"),
    ],
)
def test_one_line_and_exit_code_2(capsys, argv: list[str], line: str) -> None:
    Path("my.yaml").write_text(BASE + "tran: {epochs: 1}\n", encoding="utf-8")
    Path("latin.yaml").write_bytes("model: caf\xe9\n".encode("latin-1"))
    code, out, err = run(capsys, *argv)
    assert (code, out, err) == (2, "", f"align: {line}\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (AlignError("a.jsonl:7: chosen: empty"), 2, "a.jsonl:7: chosen: empty"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "x: No such file or directory"),
        (OSError("disk\nfull"), 2, "disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            KeyError("step"),
            1,
            "internal error: KeyError: 'step'; rerun with --debug for the traceback",
        ),
    ],
)
def test_errors_inside_a_command(capsys, monkeypatch, error, code: int, line: str) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli, "run_ls", fail)
    assert run(capsys, "ls") == (code, "", f"align: {line}\n")
    for argv in (["--debug", "ls"], ["ls", "--debug"]):
        got, _, err = run(capsys, *argv)
        assert got == code
        assert err.startswith("Traceback")
        assert err.endswith(f"align: {line}\n")


def test_a_stage_gets_its_recipe(capsys, monkeypatch) -> None:
    got: list[object] = []
    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], run=got.append))
    assert run(capsys, "sft", "tiny/sft", "train.epochs=2")[0] == 0
    assert got[0].train.epochs == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "argv",
    [
        ["sweep", "dpo", "tiny/dpo", "a.b=1", "--over", "dpo.beta=0.1", "train.epochs=2"],
        ["check", "tiny/dpo", "--stage", "dpo", "a.b=1", "train.epochs=2"],
    ],
)
def test_overrides_may_stand_behind_an_option(argv: list[str]) -> None:
    assert cli._parse(argv).overrides == ["a.b=1", "train.epochs=2"]


@pytest.mark.parametrize("left", [["--ovr=1"], ["--lr", "a=1"], ["word"]])
def test_what_is_no_override_is_not_taken_for_one(capsys, left: list[str]) -> None:
    code, out, err = run(capsys, "sweep", "dpo", "tiny/dpo", "--over", "a=1", *left)
    line = f"unrecognized arguments: {' '.join(left)}; see `align --help`"
    assert (code, out, err) == (2, "", f"align: {line}\n")


def test_ls_and_cp(capsys) -> None:
    assert run(capsys, "ls") == (0, "tiny/sft  Fine-tune.\n", "")
    code, out, _ = run(capsys, "cp", "tiny/sft", "mine.yaml")
    assert (code, out.split(":")[0]) == (0, "mine.yaml")
    assert Path("mine.yaml").read_text() == "# Fine-tune.\n" + BASE


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_key_with_its_default_unit_and_range(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    listed = {line.split()[0] for line in out.splitlines() if re.match(r"  \w", line)}
    recipe = STAGES[stage].recipe
    leaves = {key.rpartition(".")[2] for key in dotted_keys(recipe)}
    assert leaves - listed <= {name for name, _ in sections(recipe)} | {"vllm"}
    if stage == "dpo":
        assert re.search(r"\n  beta = 0.1 +number, \(0, 10000\], reward units per nat\n", out)
        assert re.search(r"\n  lr = 1e-05 +number, \(0, inf\)\n +peak learning rate\n", out)
        assert re.search(r"\n  schedule = cosine +cosine \| linear \| constant\n", out)
        assert re.search(r"\n  model \(needed\) +text\n", out)


@pytest.mark.parametrize("argv", [["--help"], ["ppo", "--help"], ["--version"], ["sfft"]])
def test_help_and_typos_do_not_load_torch(argv: list[str]) -> None:
    code = (
        "import sys\nfrom align.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert done.returncode == 0


CHURN = """
import resource
import sys
from align.base import libraries

def churn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (16 * 2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    libraries.keep_freed_memory()
print(churn(), churn())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    def faults(how: str) -> tuple[int, ...]:
        found = subprocess.run(
            [sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True
        )
        return tuple(map(int, found.stdout.split()))

    first, second = faults("kept")
    assert second < 0.05 * first
    first, second = faults("returned")
    assert second > 0.5 * first


@pytest.mark.parametrize("name", ["TRIM_THRESHOLD", "MMAP_THRESHOLD", "MMAP_MAX"])
def test_the_users_own_allocator_settings_are_kept(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda name: told.append("changed"))
    monkeypatch.setenv(f"MALLOC_{name}_", "1")
    libraries.keep_freed_memory()
    assert told == []
