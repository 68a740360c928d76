from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config.sections import RewardTerm
from align.rewards import (
    FunctionReward,
    build_reward,
    check_functions,
    columns_of,
    load_function,
    score_responses,
)
from align.types import AlignError, PromptExample, RewardSource

PROMPTS, RESPONSES, REFERENCES = ["p", "q"], ["a", "bb"], [(), ()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write_module(folder: Path, body: str, name: str = "my_rewards") -> None:
    (folder / f"{name}.py").write_text(body)


def score_with(body: str, folder: Path) -> list[float]:
    write_module(folder, f"import math\n\ndef f(prompts, responses, references):\n    {body}\n")
    return load_function("my_rewards:f")(PROMPTS, RESPONSES, REFERENCES)


def test_function_in_the_working_directory(folder: Path) -> None:
    assert score_with("return [len(r) / 2 for r in responses]", folder) == [0.5, 1.0]


def test_a_module_is_named_without_py() -> None:
    with pytest.raises(AlignError, match=r"named without .py: my.rewards:brevity"):
        load_function("my/rewards.py:brevity")


def test_function_in_a_package(folder: Path) -> None:
    (folder / "pack").mkdir()
    (folder / "pack" / "mod.py").write_text("def f(responses):\n    return [1, 2]\n")
    source = load_function("pack.mod:f")
    assert source.name == "pack.mod:f"
    assert source(PROMPTS, RESPONSES, REFERENCES) == [1.0, 2.0]


@pytest.mark.parametrize(
    "scores",
    [
        np.array([1.0, 0.0], dtype=np.float32),
        np.array([True, False]),
        np.array([1, 0.0], dtype=object),
        torch.tensor([1.0, 0.0], requires_grad=True),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        (1, 0.0),
        [True, False],
        [np.float32(1), np.int64(0)],
        [np.bool_(True), np.float16(0)],
        [torch.tensor(1.0, requires_grad=True), torch.tensor([0])],
        [Fraction(1), 0],
    ],
    ids=lambda scores: f"{type(scores).__name__} of {type(scores[0]).__name__}",
)
def test_arrays_tensors_and_their_numbers_are_scores(scores: object) -> None:
    got = FunctionReward("f", lambda *_: scores)(PROMPTS, RESPONSES, REFERENCES)
    assert got == [1.0, 0.0]
    assert all(type(score) is float for score in got)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return [1.0] * 3", "returned 3 scores for 2 responses"),
        ("return [1.0, math.nan]", "score of response 1 is nan"),
        ("return [math.inf, 1.0]", "score of response 0 is inf"),
        ("return [1.0, '2']", "score of response 1 is '2'"),
        ("return [1.0, None]", "score of response 1 is None"),
        ("return [[1.0], [2.0]]", r"score of response 0 is \[1.0\]"),
        ("return [1.0, 1j]", "score of response 1 is 1j"),
        ("return [1.0, 10 ** 400]", "score of response 1 is 1000.*must be a finite float$"),
        ("return [1.0, -1e39]", "score of response 1 is -1e.39.*float32 ends at"),
        ("return {'a': 1.0, 'b': 2.0}", "returned dict"),
        ("return (1.0 for _ in responses)", "returned generator, must return a list of 2"),
        ("return __import__('numpy').zeros((2, 1))", r"score of response 0 is \[0.0\]"),
        ("return __import__('torch').tensor(1.0)", "returned Tensor, must return a list of 2"),
        ("async def g(): ...\n    return g()", "returned a coroutine"),
        ("return None", "returned NoneType, must return a list of 2 floats"),
        ("return 'ab'", "returned str"),
        ("return 1.0", "returned float"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines"),
    ],
)
def test_bad_answers_are_one_line(body: str, message: str, folder: Path) -> None:
    with pytest.raises(AlignError, match=message) as caught:
        score_with(body, folder)
    assert "\n" not in str(caught.value)
    assert "my_rewards:f" in str(caught.value)


@pytest.mark.parametrize("name", ["my_rewards", "my_rewards:", ":f", "", "my_rewards.f"])
def test_name_must_be_module_and_function(name: str) -> None:
    with pytest.raises(AlignError, match="must be module:function"):
        load_function(name)


@pytest.mark.parametrize("name", ["nowhere:f", "nowhere.inner:f"])
def test_missing_module(name: str, folder: Path) -> None:
    with pytest.raises(AlignError, match=f"no module 'nowhere' in {folder}"):
        load_function(name)


def test_missing_function_lists_those_there(folder: Path) -> None:
    write_module(folder, "from math import sqrt\n\ndef brevity(p, r, refs): ...\n\nlimit = 3\n")
    with pytest.raises(AlignError, match=r"no function 'brevty'; it has brevity$"):
        load_function("my_rewards:brevty")
    with pytest.raises(AlignError, match="no function 'limit'"):
        load_function("my_rewards:limit")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import not_installed_here", "importing my_rewards raised ModuleNotFoundError.*not_inst"),
        ("def f(:", "importing my_rewards raised SyntaxError"),
        ("1 / 0", "importing my_rewards raised ZeroDivisionError"),
    ],
)
def test_module_that_does_not_import(body: str, message: str, folder: Path) -> None:
    write_module(folder, body)
    with pytest.raises(AlignError, match=message):
        load_function("my_rewards:f")


def built(arguments: str, folder: Path, body: str = "return [0.0, 0.0]") -> RewardSource:
    write_module(folder, f"def f({arguments}):\n    {body}\n")
    return build_reward([RewardTerm(function="my_rewards:f")], load_model=pytest.fail)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ("prompts, responses, references", "prompts, responses, references"),
        ("references, prompts, responses", "prompts, responses, references"),  # by name
        ("responses", "responses"),
        ("responses, prompts", "prompts, responses"),
        ("*, references, responses", "responses, references"),
        ("references, responses, /", "responses, references"),
        ("prompts, /, **rest", "prompts, rest['responses'], rest['references']"),
        ("**rest", "rest['prompts'], rest['responses'], rest['references']"),
        ("responses, weight=1.0, **rest", "rest['prompts'], responses, weight"),
        ("*all", "*all,"),
        ("*all, **rest", "*all, *rest.values()"),
        ("responses, limit=3, response_weight=2", "responses, limit, response_weight"),
    ],
)
def test_arguments_are_matched_by_name(arguments: str, seen: str, folder: Path) -> None:
    columns = {"prompts": ["p", "q"], "responses": ["a", "b"], "references": [("r",), ()]}
    own = {"weight": 1.0, "limit": 3, "response_weight": 2}
    reward = built(arguments, folder, f"global got; got = [{seen}]; return [0.0, 0.0]")
    assert reward(**columns) == [0.0, 0.0]
    given = sys.modules["my_rewards"].got
    names = re.findall(r"prompts|responses|references|response_weight|weight|limit", seen)
    assert given == [(columns | own)[name] for name in names or columns]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("prompt, responses", "nothing is given for prompt (did you mean prompts?)"),
        ("a, b, c", "nothing is given for a: "),
        ("prompts, responses, refs", "nothing is given for refs"),
        ("prompts, completions", "nothing is given for completions (did you mean responses?)"),
        ("completions, **kwargs", "nothing is given for completions (did you mean responses?)"),
        ("responses, ground_truth", "nothing is given for ground_truth (did you mean references?)"),
        ("responses, reference=None", "nothing is given for reference (did you mean references?)"),
        ("responses, completions=()", "nothing is given for completions (did you mean responses?)"),
        ("prompts, *others", "nothing is given to *others"),
        ("limit=3", "none of what it is given"),
        ("", "none of what it is given"),
    ],
)
def test_names_that_nothing_is_given_for_are_refused(
    arguments: str, what: str, folder: Path
) -> None:
    write_module(folder, f"def f({arguments}):\n    raise SystemExit('it was called')\n")
    with pytest.raises(AlignError) as caught:
        check_functions("reward", [RewardTerm(function="my_rewards:f")], {})
    assert str(caught.value).startswith(
        f"reward.function='my_rewards:f': takes ({arguments}), {what.partition(':')[0]}"
    )
    assert str(caught.value).endswith("write `def f(prompts, responses, references):`")


def test_extra_columns_are_asked_for_by_name(folder: Path) -> None:
    write_module(folder, "def f(tests, responses, **rest):\n    return [tests[0], len(rest)]\n")
    rows = [{"tests": 4.0, "topic": "sea", "responses": "not ours"}, {"tests": 5.0}]
    examples = [PromptExample(id=str(n), prompt="p", extra=row) for n, row in enumerate(rows)]
    terms = [RewardTerm(function="my_rewards:f", weight=0.5)]
    columns = columns_of(examples)
    assert columns == {"tests": None, "topic": "1", "responses": "1"}
    assert len(check_functions("reward", terms, columns)) == 1
    reward = build_reward(terms, load_model=pytest.fail)
    # rest: prompts, references and topic
    assert score_responses(reward, examples, ["a", "b"]) == [2.0, 1.5]
    with pytest.raises(AlignError, match="nothing is given for tests"):
        check_functions("reward", terms, {})
    check_functions("reward", terms)  # the data have not been read: it may be a column
    write_module(folder, "def f(test): ...\n", "others")
    with pytest.raises(AlignError) as caught:
        check_functions("reward", [RewardTerm(function="others:f")], columns)
    assert "may ask for prompts, responses, references and the data's columns tests, topic" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("async def f(responses): ...", "an async function"),
        ("async def f(responses):\n    yield 1", "an async generator"),
        ("def f(responses):\n    yield 1.0", "a generator"),
        ("class f:\n    def __init__(self, responses): ...", "a class"),
        ("class C:\n    async def __call__(self, responses): ...\nf = C()", "an async function"),
    ],
)
def test_what_returns_before_it_has_computed_is_refused(
    module: str, what: str, folder: Path
) -> None:
    write_module(folder, module)
    with pytest.raises(AlignError, match=f"reward.function='my_rewards:f': is {what}"):
        build_reward([RewardTerm(function="my_rewards:f")], load_model=pytest.fail)


def test_objects_partials_and_builtins_can_be_rewards(folder: Path) -> None:
    write_module(
        folder,
        "from functools import partial\n"
        "class C:\n    def __call__(self, responses): return [2.0] * len(responses)\n"
        "def g(responses, scale): return [scale] * len(responses)\n"
        "f, h = C(), partial(g, scale=3.0)\n",
    )
    for name, score in (("f", 2.0), ("h", 3.0)):
        source = [RewardTerm(function=f"my_rewards:{name}")]
        assert build_reward(source, load_model=pytest.fail)(["p"], ["r"], [()]) == [score]


def test_a_function_works_on_copies(folder: Path) -> None:
    body = (
        "prompts[0][0]['content'] = 'x'; prompts.clear(); responses.sort(); "
        "references[:] = []; return [0.0, 0.0]"
    )
    prompts = [({"role": "user", "content": "q"},), "p"]
    responses, references = ["b", "a"], [("r",), ()]
    assert built("prompts, responses, references", folder, body)(
        prompts, responses, references
    ) == [0.0, 0.0]
    assert prompts == [({"role": "user", "content": "q"},), "p"]
    assert (responses, references) == (["b", "a"], [("r",), ()])


MIXED = [
    PromptExample(id="d:1", prompt="p", extra={"topic": "sea"}),
    PromptExample(id="d:2", prompt="p", extra={"topic": None, "answer": 2}),
    PromptExample(id="d:3", prompt="p", extra={"topic": "ice"}),
]


@pytest.mark.parametrize("arguments", ["responses, answer", "answer, /, responses"])
def test_a_column_that_a_function_needs_is_in_every_row(arguments: str, folder: Path) -> None:
    write_module(folder, f"def f({arguments}): return [0.0] * len(responses)\n")
    terms = [RewardTerm(function="my_rewards:f")]
    for rows, first in ((MIXED, "d:1"), (MIXED[1:], "d:3")):
        with pytest.raises(AlignError) as caught:
            check_functions("reward", terms, columns_of(rows))
        assert f"row {first} has no column answer: add it to every row" in str(caught.value)
    check_functions("reward", terms, columns_of(MIXED[1:2]))


def test_a_null_is_a_value(folder: Path) -> None:
    write_module(folder, "def f(topic): return [float(t is None) for t in topic]\n")
    terms = [RewardTerm(function="my_rewards:f")]
    check_functions("reward", terms, columns_of(MIXED))
    reward = build_reward(terms, load_model=pytest.fail)
    assert score_responses(reward, MIXED, ["a", "b", "c"]) == [0.0, 1.0, 0.0]


def test_a_batch_without_a_column_gives_none_where_other_rows_have_it(folder: Path) -> None:
    write_module(folder, "def f(responses, answer=2): return [float(a is None) for a in answer]\n")
    terms = [RewardTerm(function="my_rewards:f")]
    names = columns_of(MIXED)
    check_functions("reward", terms, names)
    reward = build_reward(terms, load_model=pytest.fail)
    assert score_responses(reward, MIXED[:1], ["a"], names) == [1.0]
    assert score_responses(reward, MIXED[1:], ["a", "b"], names) == [0.0, 1.0]


def test_a_column_in_the_place_of_a_default_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(
        folder, "def f(responses, topic='x', answer=2, limit=3, references=()): return [0.0]\n"
    )
    terms = [RewardTerm(function="my_rewards:f")]
    columns = {**columns_of(MIXED), "references": None}
    check_functions("reward", terms, columns)
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "columns replace the defaults of its parameters topic, answer; rename" in told
    check_functions("reward", terms, columns, quiet=True)
    check_functions("reward", terms)
    assert capsys.readouterr().out == ""


def test_a_function_without_a_signature_gets_prompts_first(folder: Path) -> None:
    write_module(folder, "def f(*given): return [float(given[1][0])]\n")
    reward = build_reward([RewardTerm(function="my_rewards:f")], load_model=pytest.fail)
    assert score_responses(reward, MIXED[:1], ["7"]) == [7.0]
