"""The documents say what the code does: their numbers, commands, examples and drawings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from align import cli
from align.config.load import find_recipe, load_recipe, shipped_recipes
from align.config.sections import DataSource
from align.data.examples import load_examples
from align.data.tokens.packing import collate
from align.evaluation.compare import Comparison
from align.evaluation.metrics import CORPUS_METRICS
from align.evaluation.wins import EqualLength, WinRate
from align.losses.dpo import LOSSES
from align.rewards import load_function
from align.run.doctor import LIMITS
from align.stages import STAGES
from align.types import TokenGroup, TokenSequence

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
LINKING += [ROOT / "benchmarks" / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; `jsonl sft` and the like count as a language."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return [body for name, body in found if name.strip() == language]


# ---------------------------------------------------------------- numbers that are logged

WRITERS = [
    "stages/router.py",
    *(f"stages/{n}.py" for n in ("sft", "reward_model", "dpo", "generate")),
    *(f"stages/ppo/{n}.py" for n in ("run", "update", "rollouts", "metrics")),
    "training/finite.py",
    "stages/iterate.py",
    "training/loop.py",
    "run/folder.py",
    *(f"evaluation/{n}.py" for n in ("harness", "measure", "systems", "agreement", "reward")),
]
# keys of dictionaries that are no logged numbers: arguments, manifest, checkpoints
NO_NUMBERS = {
    "stages/ppo/run.py": {
        "before",
        "evaluation_due",
        "left_out_in_a_row",
    },
    "training/finite.py": {"step", "what", "value", "ids"},
    "stages/ppo/update.py": {
        "actor",
        "critic",
        "clip_range",
        "denominator",
        "ratio_error",
        "taken",
    },
    "stages/iterate.py": {
        *("generate", "rm", "ppo", "dpo", "eval", "seed", "resume", "overwrite", "policy"),
        *("fixed", "refresh"),
    },
    "training/loop.py": {
        *("model", "before", "gradient", "left_out_in_a_row", "batches", "mark"),
        "evaluation_due",
    },
    "run/folder.py": {
        *("stage", "run", "status", "seed", "command", "started", "versions", "hardware"),
        "recipe",
    },
    "evaluation/harness.py": {
        *("models", "comparisons", "num_resamples", "seed", "reference", "on_tokens"),
        *("prompts", "preferences", "on_bad_row", "pooled", "win_rates", "reward_model"),
    },
    "evaluation/measure.py": {"predictions"},
}


def string_keys(tree: ast.AST) -> set[str]:
    """Keys of dictionary literals and of `x["key"] = ...`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    return {key for key in found if isinstance(key, str)}


def written_keys(writer: str) -> set[str]:
    """Keys of a file as they are logged.

    What a loss function measures is logged in training, and with `eval_` in front on held-out rows;
    what `evaluate` and `held_out_perplexity` add is logged with `eval_` in front only.
    """
    tree = ast.parse((ROOT / "align" / writer).read_text(encoding="utf-8"))
    held_out: set[str] = set()
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for node in functions if writer.startswith("stages/") else []:
        if node.name in ("loss_fn", "_loss", "evaluate", "held_out_perplexity"):
            held_out |= {f"eval_{key}" for key in string_keys(node)}
            node.body = node.body if node.name in ("loss_fn", "_loss") else []
    return (string_keys(tree) - NO_NUMBERS.get(writer, set())) | held_out


def documented() -> set[str]:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([^`]+)`", page))


@pytest.mark.parametrize("writer", WRITERS)
def test_every_logged_number_is_explained(writer: str) -> None:
    missing = written_keys(writer) - documented()
    assert not missing, f"docs/metrics.md does not explain {sorted(missing)} of align/{writer}"


def test_every_explained_number_is_logged() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([^`]+)` \|", page, re.M))
    logged = set().union(*(written_keys(writer) for writer in WRITERS))
    logged |= {f.name for record in (Comparison, WinRate, EqualLength) for f in fields(record)}
    # made from a metric's name; test_harness.py holds the keys of a whole eval.json
    values = ("reward", "gold", "sample_chrf", "sample_reward", "sample_gold", "length")
    logged |= {f"{m}_{end}" for m in values for end in ("mean", "ci95")}
    logged |= {f"{m}{end}" for m in CORPUS_METRICS for end in ("", "_signature", "_ci95")}
    logged |= {f"{m}{end}" for m in ("distinct_1", "distinct_2") for end in ("", "_ci95")}
    logged |= {"repetition_4", "repetition_4_ci95"}
    logged |= set(LIMITS)  # what the doctor finds: its table is held by tests/run/test_doctor.py
    assert explained - logged == set(), "docs/metrics.md explains what no code writes"
    for record in (Comparison, WinRate, EqualLength):
        assert {f.name for f in fields(record)} <= explained


def test_the_gate_rejects() -> None:
    tree = ast.parse('def evaluate():\n    x["new"] = 1\n    return {"loss": 2, **more}')
    assert string_keys(tree) == {"new", "loss"}
    assert not string_keys(tree) <= documented() | {"loss"}


# ---------------------------------------------------------------- commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments of align) of every command line in a fenced block without a language."""
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if "align" in line else []
                if words[:1] in (["align"], [".venv/bin/align"]):
                    yield page.name, words[1:]
                elif "-m" in words and words[words.index("-m") + 1] == "align":
                    yield page.name, words[words.index("-m") + 2 :]


@pytest.fixture
def _examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of somebody who follows the documents: their YAML and Python files lie in it."""
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for block in [*blocks(page, "yaml"), *blocks(page, "python")]:
            name = re.match(r"# (\S+\.(?:yaml|py))\n", block)
            if name:
                Path(name[1]).write_text(block, encoding="utf-8")
    for line in [w for _, w in commands() if w[:1] == ["cp"]]:
        Path(line[2]).write_text(find_recipe(line[1]).read_text("utf-8"), encoding="utf-8")


@pytest.mark.usefixtures("_examples")
def test_commands_parse() -> None:
    found = list(commands())
    assert len(found) > 15
    for page, words in found:
        args = cli._parse(words)
        if args.command in STAGES:
            load_recipe(STAGES[args.command].recipe, args.recipe, args.overrides)
        elif args.command == "check":
            assert find_recipe(args.recipe), page


@pytest.mark.usefixtures("_examples")
def test_example_recipes_load() -> None:
    stages = {"sft": "sft", "dpo": "dpo", "ppo": "ppo", "rm": "rm", "shp": "dpo"}
    names = sorted(p for p in Path().glob("*.yaml"))
    assert len(names) >= 8
    for path in names:
        word = next(w for w in re.split(r"[_.]", path.name) if w in stages)
        load_recipe(STAGES[stages[word]].recipe, str(path), [])


@pytest.mark.usefixtures("_examples")
def test_example_rewards_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    reward = load_function("my_rewards:brevity")
    assert reward(["p"], ["one two"], [()]) == pytest.approx([-0.2])
    del sys.modules["my_rewards"]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if line.startswith("make ") else []
                assert {w for w in words[1:] if "=" not in w} <= targets, f"{page.name}: {line}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page, `-1` behind the second of a name."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        words = re.sub(r"\]\([^)]*\)", "", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        again = (f"{name}-{n}" for n in itertools.count(1))
        found.add(name if name not in found else next(a for a in again if a not in found))
    return found


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that are not there, or to headings that their page has not."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_wrong_link_is_noticed(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# A `b`, c\n## Twice\n## Twice\n```\n# no heading\n```\n", "utf-8")
    page = tmp_path / "page.md"
    right = ["other.md", "other.md#a-b-c", "other.md#twice-1", "https://a.b/c#d", "#here"]
    wrong = ["gone.md", "other.md#gone", "other.md#no-heading", "#gone", "other.md#twice-2"]
    page.write_text("# Here\n" + "".join(f"[x]({link})\n" for link in right + wrong), "utf-8")
    assert broken_links(page) == wrong


# ---------------------------------------------------------------- data, recipes, drawing


@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_example_rows_are_read(kind: str, tmp_path: Path) -> None:
    lines = "".join(blocks(ROOT / "docs" / "data.md", f"jsonl {kind}")).splitlines()
    assert len(lines) >= 5
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line, encoding="utf-8")
        loaded = load_examples([DataSource(path=str(path))], kind=kind)  # type: ignore[arg-type]
        assert len(loaded.examples) == 1


def test_rows_of_the_readme_are_json() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [r for r in re.findall(r"`(\{\".*?\})`", readme) if "[turns" not in r]
    assert len(rows) >= 4
    assert all(json.loads(row) for row in rows)


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe_keys_are_up_to_date() -> None:
    tool = load_tool("make_recipe_docs")
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.render(), "run `python tools/make_recipe_docs.py`"
    assert "|  |\n" not in page, "a key without a meaning: comment it in the code"


def test_the_python_page_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    tool = load_tool("make_python_docs")

    def told(text: str) -> list[str]:  # names and types, whatever is said of them
        return re.findall(r"^- (?:class )?`(.*?)`: ", text, re.M)

    assert told(page) == told(tool.render(page)), "run `python tools/make_python_docs.py`"
    for package in tool.PACKAGES:
        public = importlib.import_module(package).__all__
        assert len(tool.listing(package).splitlines()) == len(public) > 5


def test_every_dpo_loss_is_listed() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("## DPO losses")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(LOSSES)


def test_the_drawing_of_a_row_is_right() -> None:
    drawing = next(b for b in blocks(ROOT / "docs" / "design.md", "") if "predictor" in b)
    drawn = {line.split()[0]: line.split()[1:] for line in drawing.splitlines()}
    parts = {
        letter: [i for i, t in enumerate(drawn["input_ids"]) if t[0] == letter] for letter in "PCR"
    }
    prompt, chosen, rejected = (np.array(parts[letter], dtype=np.int32) for letter in "PCR")
    answers = tuple(TokenSequence(ids, np.ones(len(ids), bool)) for ids in (chosen, rejected))
    batch = collate([TokenGroup(prompt, answers)])
    for name in ("position_ids", "segment_ids", "predictor"):
        assert getattr(batch, name)[0].tolist() == [int(n) for n in drawn[name]], name
    assert batch.loss_mask[0].tolist() == [mark == "x" for mark in drawn["loss_mask"]]


SHIPPED = shipped_recipes()


@pytest.mark.parametrize("name", [n for n in SHIPPED if not n.startswith("tiny/")])
def test_every_number_of_a_recipe_has_a_comment(name: str) -> None:
    for number, line in enumerate(SHIPPED[name].read_text("utf-8").splitlines(), start=1):
        setting = re.match(r"\s*(\w+):\s+-?[\d.]+(e-?\d+)?\s*$", line)
        assert not setting or setting[1] == "seed", f"{name}:{number}: {line.strip()}: no comment"
