from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.base import checksums, folders
from align.base.checksums import load_tensors, save_tensors
from align.training import checkpoint as module
from align.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from align.types import AlignError

Pair = tuple[torch.nn.Module, torch.optim.Optimizer]


def made(seed: int, width: int = 4) -> Pair:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 1))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1, fused=True)


def step(pair: Pair, seed: int) -> None:
    model, optimizer = pair
    torch.manual_seed(seed)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def names(folder: Path) -> list[str]:
    return [p.name for p in checkpoints(folder)]


def test_goes_on_exactly(tmp_path: Path) -> None:
    """Weights, both moments and the step count: the next steps are the same bit for bit."""
    whole = {"actor": made(0), "critic": made(1, width=6)}
    for pair in whole.values():
        step(pair, 10)
        step(pair, 11)
    save_checkpoint(tmp_path, 2, whole, {"kl_coef": 0.1 + 0.2}, keep=1)
    resumed = {"actor": made(0), "critic": made(1, width=6)}
    state = load_checkpoint(tmp_path / "step-2", resumed)
    assert state == {"step": 2, "kl_coef": 0.1 + 0.2}
    for pairs in (whole, resumed):
        for pair in pairs.values():
            step(pair, 12)
    for role in whole:
        for (name, a), b in zip(
            whole[role][0].named_parameters(), resumed[role][0].parameters(), strict=True
        ):
            assert torch.equal(a, b), name


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    pair = made(0)
    step(pair, 10)
    save_checkpoint(tmp_path, 1, {"model": pair}, {}, keep=1)
    frozen = pair[0][0].bias.clone()
    other = made(5)
    load_checkpoint(tmp_path / "step-1", {"model": other})
    assert torch.equal(other[0][1].weight, pair[0][1].weight)
    assert not torch.equal(other[0][0].bias, frozen)


def test_a_switched_requires_grad_changes_nothing(tmp_path: Path) -> None:
    """A signal may come while an adapter is off, or while frozen weights are cast once."""
    pair = {"model": made(0)}
    step(pair["model"], 10)
    size = module.size_of(pair)
    for number, flag in enumerate((False, True), start=1):
        model = pair["model"][0]
        flags = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(flag)
        place = save_checkpoint(tmp_path, number, pair, {}, keep=2)
        assert module.size_of(pair) == size
        assert set(load_file(place / "model.safetensors")) == {"0.weight", "1.weight", "1.bias"}
        for parameter, was in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(was)
        assert module.damage(place, pair) == ""
        other = {"model": made(5)}
        load_checkpoint(place, other)
        assert torch.equal(other["model"][0][0].weight, model[0].weight)


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    for number in (8, 9, 10, 11):
        save_checkpoint(tmp_path, number, pair, {}, keep=3)
    assert names(tmp_path) == ["step-9", "step-10", "step-11"]
    save_checkpoint(tmp_path, 12, pair, {}, keep=1)
    assert names(tmp_path) == ["step-12"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {"n": 1}, keep=2)
    save_checkpoint(tmp_path, 1, pair, {"n": 2}, keep=2)
    assert load_checkpoint(tmp_path / "step-1", pair)["n"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {}, keep=2)
    (tmp_path / "partial-step-2").mkdir()
    (tmp_path / "partial-step-2" / "state.json").write_text('{"step": 2}')
    (tmp_path / "step-3").mkdir()  # renamed by hand, without its state
    assert names(tmp_path) == ["step-1"]
    save_checkpoint(tmp_path, 2, pair, {}, keep=2)  # over the leftover
    assert names(tmp_path) == ["step-1", "step-2"]


def test_killed_between_the_renames_of_a_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoint is set aside, the new one has not taken its place: it still counts."""
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {"n": 1}, keep=1)
    original = folders.move_into_place

    def dying(partial: Path, place: Path) -> None:
        if place.name == "step-1":
            raise KeyboardInterrupt
        original(partial, place)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "move_into_place", dying)
        patch.setattr(folders, "_put_back", lambda *a: None)  # a killed process does not
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 1, pair, {"n": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["old-step-1"]
    (only,) = checkpoints(tmp_path)
    assert load_checkpoint(only, pair)["n"] == 1
    save_checkpoint(tmp_path, 2, pair, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def test_a_replacement_that_fails_puts_the_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {"n": 1}, keep=1)
    original = folders.move_into_place

    def failing(partial: Path, place: Path) -> None:
        if place.name == "step-1":
            raise OSError(5, "Input/output error")
        original(partial, place)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "move_into_place", failing)
        with pytest.raises(AlignError, match=r"step-1: cannot be written: Input/output error; the"):
            save_checkpoint(tmp_path, 1, pair, {"n": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert load_checkpoint(tmp_path / "step-1", pair)["n"] == 1


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at a save and at a resume: each waits for another one that is under way."""
    together = threading.Barrier(2, timeout=20)
    original = checksums.sha256_of

    def meeting(path: Path) -> object:
        if path.suffix == ".safetensors":
            together.wait()
        return original(path)

    monkeypatch.setattr(checksums, "sha256_of", meeting)
    pair = made(0)
    step(pair, 10)
    place = save_checkpoint(tmp_path, 1, {"actor": pair}, {"run": "a"}, keep=1)
    assert module.damage(place, {"actor": pair}, run="a") == ""
    weights = place / "actor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert "actor.safetensors: its content has changed" in module.damage(
        place, {"actor": pair}, run="a"
    )


def test_the_best_is_kept_whatever_its_age(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    for number in (2, 3, 10, 11):
        save_checkpoint(tmp_path, number, pair, {}, keep=2, also_keep=[2])
    assert names(tmp_path) == ["step-2", "step-10", "step-11"]


def test_a_checkpoint_inside_a_step_of_an_older_align_is_passed_over(tmp_path: Path) -> None:
    """It comes after its step, and is damaged whatever it holds."""
    pair = {"model": made(0)}
    for number in (2, 3):
        save_checkpoint(tmp_path, number, pair, {"run": "abc"}, keep=9)
    for part in ("step-2-part-1", "step-2-part-10", "step-3-part-2"):
        shutil.copytree(tmp_path / part.partition("-part")[0], tmp_path / part)
    ordered = ["step-2", "step-2-part-1", "step-2-part-10", "step-3", "step-3-part-2"]
    assert names(tmp_path) == ordered
    for name in ordered:
        found = module.damage(tmp_path / name, pair, run="abc")
        assert ("saved it in the middle of a PPO iteration" in found) == ("part" in name)
    save_checkpoint(tmp_path, 4, pair, {}, keep=1)
    assert names(tmp_path) == ["step-4"]


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    (tmp_path / "step-1").rename(tmp_path / "step-7")
    with pytest.raises(AlignError, match=r"step-7: cannot be read: state.json is of step 1"):
        load_checkpoint(tmp_path / "step-7", pair)


def test_a_save_that_dies_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"actor": made(0), "critic": made(1)}
    save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    written = 0

    def dying(tensors: object, path: Path, metadata: object = None) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError("No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr(module, "_save_tensors", dying)
    with pytest.raises(AlignError, match=r"step-2: cannot be written: No space left"):
        save_checkpoint(tmp_path, 2, pair, {}, keep=1)
    assert names(tmp_path) == ["step-1"]
    assert load_checkpoint(tmp_path / "step-1", pair)["step"] == 1


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"model": made(0)}, {"before": None}, keep=1)
    found = sorted(p.name for p in (tmp_path / "step-1").iterdir())
    tensors = ["model.optimizer.safetensors", "model.safetensors"]
    assert found == ["SHA256SUMS", *tensors, "state.json"]
    assert json.loads((tmp_path / "step-1" / "state.json").read_text())["before"] is None


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"model": made(0)}, {}, keep=1)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    said = "holds other parameters than this recipe trains"
    with pytest.raises(AlignError, match=said):
        load_checkpoint(tmp_path / "step-1", {"model": (model, optimizer)})
    assert said in module.damage(tmp_path / "step-1", {"model": (model, optimizer)})


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    step(pair["model"], 10)
    place = save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    file = place / "model.optimizer.safetensors"
    moments = load_file(file)
    save_file({**moments, "1.bias/exp_avg": torch.zeros(2)}, file)
    said = "holds other moments than this recipe trains"
    assert said in module.damage(place, pair, compare=False)
    with pytest.raises(AlignError, match=said):
        load_checkpoint(place, pair)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    (tmp_path / "step-1" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(AlignError, match=r"step-1: cannot be read: .*; remove it"):
        load_checkpoint(tmp_path / "step-1", pair)


FILES = ("state.json", "actor.safetensors", "actor.optimizer.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["cut", "empty", "gone"])
def test_damage_is_told_without_loading(tmp_path: Path, file: str, harm: str) -> None:
    pair = made(0)
    step(pair, 10)
    place = save_checkpoint(tmp_path, 1, {"actor": pair}, {}, keep=1)
    assert module.damage(place, {"actor": pair}) == ""
    whole = (place / file).read_bytes()
    if harm == "gone":
        (place / file).unlink()
    else:
        (place / file).write_bytes(whole[: len(whole) - 1] if harm == "cut" else b"")
    found = module.damage(place, {"actor": pair})
    assert found.startswith(f"checkpoint {place}: cannot be read: ")


def test_a_damaged_checkpoint_is_set_aside_under_a_name_of_its_own(tmp_path: Path) -> None:
    pair = {"model": made(0)}
    for n in (1, 2):
        save_checkpoint(tmp_path, 3, pair, {"n": n}, keep=1)
        module.set_aside(tmp_path / "step-3")
    assert names(tmp_path) == []
    held = {p.name: json.loads((p / "state.json").read_text())["n"] for p in tmp_path.iterdir()}
    assert held == {"damaged-step-3": 1, "damaged-step-3-1": 2}


# ---------------------------------------------------------------- what a checkpoint knows of itself


@pytest.mark.parametrize(
    "file", ["state.json", "actor.safetensors", "actor.optimizer.safetensors", "SHA256SUMS"]
)
@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_one_flipped_bit_is_named(tmp_path: Path, file: str, at: float) -> None:
    pair = made(0)
    step(pair, 10)
    place = save_checkpoint(tmp_path, 1, {"actor": pair}, {"run": "abc"}, keep=1)
    assert module.damage(place, {"actor": pair}, run="abc") == ""
    whole = bytearray((place / file).read_bytes())
    whole[int(at * len(whole))] ^= 1
    (place / file).write_bytes(whole)
    found = module.damage(place, {"actor": pair}, run="abc")
    assert found.startswith(f"checkpoint {place}: cannot be read: ")
    assert file in found or file == "SHA256SUMS"


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    tensors, state = (
        {"x": torch.arange(3), "y": torch.zeros(2)},
        {"a": 0.1, "b": [1, None], "c": ""},
    )
    found = set()
    for number in range(20):
        path = tmp_path / str(number)
        save_tensors(tensors, path, state)
        found.add(path.read_bytes())
        assert load_tensors(path)[1] == state
    assert len(found) == 1


def test_files_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    pair = made(0)
    for number in (1, 2):
        step(pair, number)
        save_checkpoint(tmp_path, number, {"actor": pair}, {"run": "abc"}, keep=2)
    name = "actor.optimizer.safetensors"
    (tmp_path / "step-1" / name).replace(tmp_path / "step-2" / name)
    found = module.damage(tmp_path / "step-2", {"actor": pair}, run="abc")
    assert f"{name}: its content has changed" in found


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    pair = {"actor": made(0)}
    place = save_checkpoint(tmp_path, 1, pair, {"run": "abc"}, keep=1)
    found = module.damage(place, pair, run="def")
    assert found == f"checkpoint {place}: is of another run (abc, not def)"
    assert module.damage(place, pair, run="def", compare=False) == ""


def test_an_older_checkpoint_has_no_sums_and_no_run(tmp_path: Path) -> None:
    pair = {"actor": made(0)}
    place = save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    (place / "SHA256SUMS").unlink()
    assert module.damage(place, pair, run=None) == ""
    assert module.damage(place, pair, run="abc") == ""
    newer = save_checkpoint(tmp_path, 2, pair, {"run": "abc"}, keep=1)
    (newer / "SHA256SUMS").unlink()
    assert "SHA256SUMS is missing" in module.damage(newer, pair, run="abc")


@pytest.mark.parametrize("text", ["[1]", "null", "NaN", "", "[" * 100_000])
def test_a_state_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    pair = {"actor": made(0)}
    place = save_checkpoint(tmp_path, 1, pair, {}, keep=1)
    (place / "state.json").write_text(text)
    assert "cannot be read: state.json: " in module.damage(place, pair)


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, 1, {"actor": made(0)}, {}, keep=1)
    lines = (place / "SHA256SUMS").read_text().splitlines()
    expected = [
        f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}"
        for name in ("actor.optimizer.safetensors", "actor.safetensors", "state.json")
    ]
    assert lines == expected
