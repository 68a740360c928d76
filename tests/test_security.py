"""Nothing that was downloaded runs code, and nothing is sent anywhere."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.base.libraries import QUIET
from align.cli import main
from align.data.tokens.template import render
from align.models import load_policy, load_scalar_model, load_tokenizer
from align.types import AlignError
from tools.trust import Trust

PACKAGE = Path(__file__).parents[1] / "align"
CPU = torch.device("cpu")
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def code_that_unpickles_or_evaluates(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and options.get("weights_only") != "True":
                yield ast.unparse(node)
            if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "__import__"):
                yield ast.unparse(node)
            if options.get("allow_pickle") == "True":
                yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert list(code_that_unpickles_or_evaluates(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "eval(text)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_gate_rejects(source: str) -> None:
    assert list(code_that_unpickles_or_evaluates(source))


def test_modules_are_imported_by_name_for_commands_and_named_rewards_only() -> None:
    """`module:function` comes from a recipe or the command line: no other code imports by name."""
    importing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "import_module(" in path.read_text(encoding="utf-8")
    }
    # public names that are imported when they are asked for, from literal tables
    lazy = {"__init__.py", "data/__init__.py", "evaluation/__init__.py"}
    assert importing == lazy | {"rewards/function.py"}
    naming = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "load_function(" in path.read_text(encoding="utf-8")
    }
    assert naming == {
        "rewards/function.py", "rewards/__init__.py",
        "evaluation/harness.py", "evaluation/measure.py",  # keys of the recipe: judge, metrics
    }  # fmt: skip


@pytest.fixture
def copy_of(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


class _Touches:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [load_policy, load_scalar_model])
def test_a_pickle_is_refused_and_never_opened(
    copy_of: Path, tmp_path: Path, load: Callable[..., Any], trust: Trust
) -> None:
    (copy_of / "model.safetensors").unlink()
    (copy_of / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches(tmp_path / "touched")))
    with pytest.raises(AlignError, match="only pickled weights"):
        load(str(copy_of), device=CPU, precision="fp32")
    assert not (tmp_path / "touched").exists()
    trust.row(
        "faults",
        f"a model with pickled weights only ({load.__name__})",
        found="refused in one line, never opened",
        wanted="no code runs",
    )


def test_code_beside_a_model_does_not_run_unasked(
    copy_of: Path, tmp_path: Path, trust: Trust
) -> None:
    config = json.loads((copy_of / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    }
    (copy_of / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy_of / "strange.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    with pytest.raises(AlignError) as caught:
        load_policy(str(copy_of), device=CPU, precision="fp32")
    assert "\n" not in str(caught.value)
    assert "runs only with trust_remote_code=true" in str(caught.value)
    assert not (tmp_path / "touched").exists()
    trust.row(
        "faults",
        "a model with Python code beside it, trust_remote_code left out",
        found="refused in one line, never run",
        wanted="no code runs",
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch TOUCHED') }}",
        "{{ messages.append(messages[0]) }}",
        "{% set _ = messages[0].update({'content': 'other'}) %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ (1).__class__.__base__.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_malicious_chat_template_is_refused_in_one_line(
    tiny_chat: Path, template: str, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(str(tiny_chat))
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "hello"}]
    with pytest.raises(AlignError, match="the chat template refuses") as caught:
        render(tokenizer, turns)
    assert "\n" not in str(caught.value)
    assert turns == [{"role": "user", "content": "hello"}]
    assert not list(tmp_path.iterdir())
    trust.row("faults", f"chat template `{template}`", found="refused", wanted="no code runs")


def test_a_run_opens_no_connection(
    tiny: Path, tmp_path: Path, write_rows: Any, demonstrations: Any, trust: Trust,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def connect(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    recipe = tmp_path / "sft.yaml"
    keys = {
        "model": str(tiny),
        "output_dir": str(tmp_path / "run"),
        "data": str(write_rows("rows.jsonl", demonstrations)),
        "train": {"max_steps": 1},
    }
    recipe.write_text(json.dumps(keys), encoding="utf-8")
    assert main(["sft", str(recipe)]) == 0, capsys.readouterr().err
    assert {"HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"} <= QUIET.keys()
    trust.row("faults", "connections opened by a run", found="none", wanted="no telemetry")


def test_what_data_say_of_a_reward_is_no_reward(
    tiny_sft: Path, tmp_path: Path, write_rows: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, trust: Trust,
) -> None:  # fmt: skip
    """Neither a column of the data nor a model's own config names the function that runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('touched', 'w')\ndef f(**_): return []\n")
    model = shutil.copytree(tiny_sft, tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["reward"] = {"function": "evil:f"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [{"prompt": "one two: ", "reward": "evil:f", "function": "evil:f", "references": ["a"]}]
    recipe = tmp_path / "ppo.yaml"
    keys = {
        "model": str(model),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(write_rows("rows.jsonl", rows)), "test_fraction": 0},
        "reward": {"metric": "chrf"},
        "ppo": {"iterations": 1, "rollout_batch": 2},
        "generation": {"max_new_tokens": 2},
    }
    recipe.write_text(json.dumps(keys), encoding="utf-8")
    assert main(["ppo", str(recipe)]) == 0, capsys.readouterr().err
    assert not (tmp_path / "touched").exists()
    trust.row(
        "faults",
        "`module:function` in data and in a model's config",
        found="not imported",
        wanted="no code runs",
    )
