"""Recipes: the right ones round-trip, each wrong one gets one line with the key and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config import keys as config
from align.config import load as recipes_io
from align.config.annotations import Range, notes
from align.config.describe import sections
from align.config.keys import DPORecipe, EvalRecipe, GenerateRecipe, PPORecipe, SFTRecipe
from align.config.load import find_recipe, first_comment, load_recipe, to_yaml
from align.config.sections import DataSource, LoraOptions, RewardTerm
from align.types import AlignError

BASE = "model: m\noutput_dir: o\n"
PPO = BASE + "reward: rm\n"
RECIPES = [getattr(config, n) for n in dir(config) if n.endswith("Recipe") and n != "CommonRecipe"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "my.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


@pytest.mark.parametrize(
    ("cls", "text", "overrides"),
    [
        (SFTRecipe, BASE, []),
        (SFTRecipe, BASE + "data: [a, {path: b, weight: 0.5}]", ["lora.r=8", "trackers=wandb"]),
        (SFTRecipe, BASE + "data: {train: a, columns: {prompt: info.post}}", ["optim.lr=3e-6"]),
        (PPORecipe, PPO, ["ppo.missing_eos_score=null", "reward=[{metric: chrf++, weight: -1}]"]),
        (EvalRecipe, "output_dir: o\nmodels: {sft: a, ppo: b}", ["sampling.temperature=0.7"]),
        (SFTRecipe, BASE, ["model=a\\${b}"]),
    ],
)
def test_round_trip(write, cls, text: str, overrides: list[str]) -> None:
    recipe = load_recipe(cls, write(text), overrides)
    again = load_recipe(cls, write(to_yaml(recipe), "again.yaml"), [])
    assert again == recipe


@given(lr=st.floats(min_value=1e-30, max_value=1e30), seed=st.integers(0, 2**32 - 1))
def test_numbers_survive_the_round_trip(tmp_path_factory, lr: float, seed: int) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    recipe = SFTRecipe(model="m", output_dir="o", seed=seed, optim=config.OptimOptions(lr=lr))
    path.write_text(to_yaml(recipe))
    assert load_recipe(SFTRecipe, str(path), []) == recipe


@pytest.mark.parametrize(
    ("cls", "text", "override", "message"),
    [
        (
            PPORecipe,
            PPO + "ppo: {kl_coeff: 1}",
            None,
            "ppo.kl_coeff: no such key; did you mean kl.coef?",
        ),
        (PPORecipe, PPO, "ppo.kl_coeff=1", "ppo.kl_coeff: no such key; did you mean kl.coef?"),
        (
            SFTRecipe,
            BASE + "train: {epoch: 1}",
            None,
            "train.epoch: no such key; did you mean train.epochs?",
        ),
        (
            SFTRecipe,
            BASE + "learning_rate: 1",
            None,
            "learning_rate: no such key; did you mean optim.lr?",
        ),
        (
            SFTRecipe,
            BASE + "data: {train: {paht: x}}",
            None,
            "data.train.paht: no such key; did you mean data.train.path?",
        ),
        (PPORecipe, PPO, "save_every=5", "save_every: is train.save_every since version 0.2"),
        (
            PPORecipe,
            PPO + "keep_best: score",
            None,
            "keep_best: is train.keep_best since version 0.2",
        ),
        # where nothing was renamed there is no such line
        (
            SFTRecipe,
            BASE,
            "save_every=5",
            "save_every: no such key; did you mean train.save_every?",
        ),
        (SFTRecipe, "output_dir: o", None, "model: is missing and has no default; set it"),
        (SFTRecipe, BASE, "train.minibatch=1.5", "train.minibatch: is 1.5; wanted a whole number"),
        (
            SFTRecipe,
            BASE,
            "train.minibatch=true",
            "train.minibatch: is true; wanted a whole number",
        ),
        (SFTRecipe, BASE, "overwrite=1", "overwrite: is 1; wanted true or false"),
        (SFTRecipe, BASE, "optim.lr=abc", "optim.lr: is 'abc'; wanted a number"),
        (SFTRecipe, BASE, "optim.lr=.nan", "optim.lr: is nan; wanted a number"),
        (SFTRecipe, BASE, "model=12", "model: is 12; wanted text (put it in quotes)"),
        (SFTRecipe, BASE, "lora=true", "lora: is true; wanted a mapping of keys"),
        (SFTRecipe, BASE, "precision=fp16", "precision: is 'fp16'; allowed: auto, bf16, fp32"),
        (SFTRecipe, BASE, "optim.lr=0", "optim.lr: is 0.0; allowed: above 0"),
        (
            SFTRecipe,
            BASE,
            "data.test_fraction=1",
            "data.test_fraction: is 1.0; allowed: at least 0 and below 1",
        ),
        (
            PPORecipe,
            PPO,
            "generation.top_p=0",
            "generation.top_p: is 0.0; allowed: above 0 and at most 1",
        ),
        (
            PPORecipe,
            PPO,
            "generation.top_p=0.9",
            "generation.top_p: must be 1 for PPO: the ratio needs all tokens",
        ),
        (
            PPORecipe,
            PPO,
            "generation.vllm.eager=true",
            "generation.vllm: has an effect with generation.engine=vllm only; remove it",
        ),
        (
            GenerateRecipe,
            BASE + "generation: {engine: vllm}",
            "generation.temperature=0.001",
            "generation.temperature: is 0.001; vLLM samples at 0.01 at least, or greedily at 0; "
            "raise it, or set generation.engine=align",
        ),
        (
            EvalRecipe,
            "output_dir: o\nmodel: m\ngeneration: {engine: vllm}\nsampling: {engine: vllm}",
            "sampling.slots=8",
            "sampling: a process holds one vLLM; give it the slots and vllm of generation",
        ),
        (PPORecipe, BASE, None, "reward: is empty; name a reward model, a function or a metric"),
        (
            PPORecipe,
            BASE + "reward: [{metric: chrf, model: x}]",
            None,
            "reward[0]: has model and metric; a reward sets exactly one of model, function, metric",
        ),
        (
            GenerateRecipe,
            BASE + "reward: {metric: chrf}\npairs: {}",
            None,
            "generation.samples_per_prompt: is 1; pairs need at least 2",
        ),
        (SFTRecipe, BASE, "lr", "'lr': wanted key=value, such as optim.lr=1e-5"),
        (SFTRecipe, BASE, "seed.x=1", "seed: is {'x': 1}; wanted a whole number"),
        (
            SFTRecipe,
            BASE + "data: a",
            "data.train.path=b",
            "data.train.path: train holds str, which has no keys of its own; "
            "set train=... as a whole",
        ),
        (SFTRecipe, "- 1", None, "holds a list; wanted a mapping such as `model: FOLDER`"),
    ],
)
def test_one_line_for_each_mistake(write, cls, text, override, message: str) -> None:
    with pytest.raises(AlignError) as caught:
        load_recipe(cls, write(text), [override] if override else [])
    where = "command line" if override else "my.yaml"
    assert str(caught.value) == f"{where}: {message}"


def test_broken_yaml_names_the_line(write) -> None:
    with pytest.raises(AlignError, match=r"my\.yaml:4: not YAML: did not find expected"):
        load_recipe(SFTRecipe, write(BASE + "x: [1\n"), [])


def test_null_sections_are_switched_on_and_off(write) -> None:
    assert load_recipe(SFTRecipe, write(BASE), ["lora.r=8"]).lora == LoraOptions(r=8)
    with_lora = write(BASE + "lora: {r: 4}")
    assert load_recipe(SFTRecipe, with_lora, []).lora == LoraOptions(r=4)
    assert load_recipe(SFTRecipe, with_lora, ["lora=null"]).lora is None


def test_a_section_keeps_its_recipes_defaults(write) -> None:
    # greedy is EvalRecipe's default for generation, not GenerationOptions' own
    recipe = write("output_dir: o\nmodel: m\ngeneration: {max_new_tokens: 9}")
    generation = load_recipe(EvalRecipe, recipe, []).generation
    assert (generation.max_new_tokens, generation.temperature) == (9, 0.0)


def test_yaml_numbers_without_a_dot_are_numbers(write) -> None:
    assert load_recipe(SFTRecipe, write(BASE + "optim: {lr: 1e-5}"), []).optim.lr == 1e-5
    assert load_recipe(SFTRecipe, write(BASE + "optim: {lr: '1e-5'}"), []).optim.lr == 1e-5


def test_data_override_replaces_train_and_drops_the_recipes_test(write) -> None:
    recipe = write(BASE + "data: {train: a, test: t, max_tokens: 99}")
    data = load_recipe(SFTRecipe, recipe, ["data=b"]).data
    assert (data.train, data.test, data.max_tokens) == ((DataSource(path="b"),), (), 99)
    data = load_recipe(SFTRecipe, recipe, ["data.train=b"]).data
    assert (data.train, data.test) == ((DataSource(path="b"),), (DataSource(path="t"),))


def test_data_shorthands_mean_the_same(write) -> None:
    wanted = (DataSource(path="a"),)
    for data in ("a", "[a]", "{train: a}", "{train: [a]}", "{train: {path: a}}"):
        assert load_recipe(SFTRecipe, write(BASE + f"data: {data}"), []).data.train == wanted


def test_no_preferences_are_the_default(write) -> None:
    text = BASE + "data: x.jsonl\n"
    assert load_recipe(EvalRecipe, write(text), ["preferences=null"]) == load_recipe(
        EvalRecipe, write(text)
    )


def test_a_recipe_named_for_another_command_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("model: m\noutput_dir: o\ndata: x.jsonl\n", encoding="utf-8")
    others = {"sft": SFTRecipe, "dpo": DPORecipe}
    assert load_recipe(SFTRecipe, str(path), others=others).model == "m"
    with pytest.raises(AlignError, match="is a recipe for `align sft` by its name; run that"):
        load_recipe(DPORecipe, str(path), others=others)


def test_a_reward_of_module_and_function_needs_no_key(write) -> None:
    found = load_recipe(PPORecipe, write("model: m\noutput_dir: o\nreward: my_rewards:brevity\n"))
    assert found.reward == (RewardTerm(function="my_rewards:brevity"),)


def test_reward_shorthands(write) -> None:
    assert load_recipe(PPORecipe, write(PPO), []).reward == (RewardTerm(model="rm"),)
    both = load_recipe(PPORecipe, write(BASE + "reward: [rm, {metric: bleu, weight: 2}]"), [])
    assert both.reward == (RewardTerm(model="rm"), RewardTerm(metric="bleu", weight=2.0))


def test_a_missing_recipe_names_the_nearest(write) -> None:
    write(BASE)
    with pytest.raises(AlignError, match=r"my.yml: no such recipe; did you mean my.yaml\?"):
        find_recipe("my.yml")
    with pytest.raises(AlignError, match="align ls"):
        find_recipe("zzzzqqqq")


def test_shipped_names_are_found_and_a_file_of_that_name_wins(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    (shipped / "tiny").mkdir(parents=True)
    (shipped / "tiny" / "sft.yaml").write_text("# Short.\n" + BASE)
    monkeypatch.setattr(recipes_io, "recipes_root", lambda: shipped)
    assert find_recipe("tiny/sft") == find_recipe("tiny/sft.yaml") == shipped / "tiny/sft.yaml"
    assert first_comment(find_recipe("tiny/sft")) == "Short."
    with pytest.raises(AlignError, match=r"did you mean tiny/sft\?"):
        find_recipe("tiny/sftt")
    Path("tiny").mkdir()
    mine = write(BASE, "tiny/sft")
    assert find_recipe("tiny/sft") == Path(mine)


def test_the_config_of_a_run_of_version_0_1_is_still_a_recipe(write) -> None:
    old = PPO + "save_every: 5\nkeep_best: score\non_nonfinite: skip\n"
    with pytest.raises(AlignError, match=r"is train.save_every since"):
        load_recipe(PPORecipe, write(old, "config.yaml"), [])
    Path("manifest.json").write_text("{}")
    train = load_recipe(PPORecipe, "config.yaml", ["train.save_every=7"]).train
    assert (train.save_every, train.keep_best, train.on_nonfinite) == (7, "score", "skip")
    with pytest.raises(AlignError, match=r"command line: save_every: is train.save_every since"):
        load_recipe(PPORecipe, "config.yaml", ["save_every=7"])


def test_every_number_of_every_recipe_has_a_range() -> None:
    for cls in RECIPES:
        for section in (cls, *(inner for _, inner in sections(cls))):
            ranges = notes(section, Range)
            for name, hint in get_type_hints(section).items():
                numeric = bool({hint, *get_args(hint)} & {int, float})
                assert (name in ranges) == numeric, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, 1)", (0, 0.99), (-0.01, 1), "at least 0 and below 1"),
        ("(0, 1]", (0.01, 1), (0, 1.01), "above 0 and at most 1"),
        ("[1, inf)", (1, 1e300), (0.99,), "at least 1"),
        ("(-inf, inf)", (-1e300, 0, 1e300), (), ""),
    ],
)
def test_a_range(
    interval: str, inside: tuple[float, ...], outside: tuple[float, ...], words: str
) -> None:
    found = Range(interval)
    assert all(number in found for number in inside)
    assert not any(number in found for number in outside)
    assert str(found) == words


# ---------------------------------------------------------------- what nobody means


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1:30", "read in sixties, as 90"),
        ("-1:30", "read in sixties, as -90"),
        ("12:30:45", "read in sixties, as 45045"),
        ("1:30.5", "read in sixties, as 90.5"),
        ("010", "read as an octal number, as 8"),
    ],
)
def test_numbers_of_yaml_1_1_are_refused(write, text: str, read: str) -> None:
    with pytest.raises(AlignError, match=rf"my.yaml:4: {text} would be {read}; write the number"):
        load_recipe(SFTRecipe, write(BASE + f"train:\n  minibatch: {text}\n"), [])
    with pytest.raises(AlignError, match=rf"command line: seed: {text} would be {read};"):
        load_recipe(SFTRecipe, write(BASE), [f"seed={text}"])
    with pytest.raises(AlignError, match=rf"my.yaml:3: {text} would be {read};"):
        load_recipe(SFTRecipe, write(BASE + f"data: [{{path: a, weight: {text}}}]\n"), [])


def test_numbers_that_are_meant_and_quoted_text_are_read(write) -> None:
    text = BASE.replace("model: m", "model: '1:30'") + "seed: 0\ntrain: {minibatch: 1_000}\n"
    recipe = load_recipe(SFTRecipe, write(text), ["optim.lr=0.001", "data='010'"])
    assert (recipe.model, recipe.seed, recipe.train.minibatch) == ("1:30", 0, 1000)
    assert recipe.data.train == (DataSource(path="010"),)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", "[{path: a, weight: 1e12}]"),
        ("lora.r", "100000000"),
        ("lora.alpha", "1e12"),
        ("optim.warmup_fraction", "1.5"),
        ("optim.weight_decay", "1e12"),
        ("train.epochs", "1e12"),
        ("train.minibatch", "16.0"),
        ("train.max_steps", "1e3"),
        ("seed", "1.0"),
    ],
)
def test_numbers_that_nobody_means_are_refused(write, key: str, value: str) -> None:
    with pytest.raises(AlignError, match=r"allowed: .* at most|wanted a whole number"):
        load_recipe(SFTRecipe, write(BASE), [f"{key}={value}"])


@pytest.mark.parametrize("value", ["0", "1e12", "-1e12"])
def test_a_reward_of_no_weight_or_too_much_is_refused(write, value: str) -> None:
    with pytest.raises(AlignError, match=r"reward\[0\].weight: is "):
        load_recipe(PPORecipe, write(PPO), [f"reward=[{{metric: chrf, weight: {value}}}]"])


@pytest.mark.parametrize(
    "text",
    ["${oc.env:SECRET}", "a/${oc.env:SECRET}/b", "${oc.${x}:SECRET}", "${oc.env:${x}, default}",
     "${oc.decode:'${oc.env:SECRET}'}", "\\\\${oc.env:SECRET}"],
)  # fmt: skip
def test_a_recipe_reads_no_environment_variable(write, monkeypatch, text: str) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    for override in ([], [f"output_dir={text}"]):
        recipe = write(BASE if override else f"output_dir: o\nmodel: {text}\n")
        with pytest.raises(AlignError, match=r"calls a function of OmegaConf, .*off by") as caught:
            load_recipe(SFTRecipe, recipe, override)
        line = str(caught.value)
        assert line.startswith("command line: output_dir: " if override else "my.yaml: model: ")
        assert "hidden" not in line
        assert "\n" not in line


def test_a_trusted_recipe_may_read_environment_variables(write, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    monkeypatch.setenv("ALIGN_ALLOW_RESOLVERS", "1")
    assert load_recipe(SFTRecipe, write("output_dir: o\nmodel: ${oc.env:SECRET}")).model == "hidden"


def test_other_keys_and_colons_are_no_functions(write) -> None:
    text = "output_dir: runs/${model}:v1\nmodel: m\ndata: ${output_dir}/x:y.jsonl\n"
    recipe = load_recipe(SFTRecipe, write(text), ["data.test=a\\${b:c}"])
    assert recipe.output_dir == "runs/m:v1"
    assert recipe.data.test == (DataSource(path="a${b:c}"),)
