"""Which kernel a model gets, and that a wrong one is found out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from align.models import Policy, load_policy
from align.models.attention import choose as backends
from align.models.attention import flash as varlen
from align.models.attention import flex
from align.models.attention import packed as attention
from align.models.attention.choose import candidates, prove, settle_backend
from align.types import AlignError, Segment
from tests.models.test_attention import one_after_another

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return load_policy(str(tiny), device=CPU, precision="fp32")


def config(architecture: Callable[[str], Path], name: str, **changes: Any) -> Any:
    found = AutoConfig.from_pretrained(architecture(name))
    for key, value in {"head_dim": 64, **changes}.items():
        setattr(found.get_text_config(), key, value)
    return found


@pytest.mark.parametrize(
    ("name", "device", "precision", "head", "want"),
    [
        ("llama", GPU, "bf16", 64, ("flash", "segments")),
        ("llama", GPU, "bf16", 60, ("segments",)),
        ("llama", GPU, "bf16", 512, ("segments",)),
        ("llama", GPU, "fp32", 64, ("segments",)),
        ("llama", CPU, "bf16", 64, ("segments",)),
        ("gemma2", GPU, "bf16", 64, ("flex", "segments")),
        ("gemma2", GPU, "fp32", 64, ("segments",)),
        ("gemma2", CPU, "bf16", 64, ("segments",)),
    ],
)
def test_auto_is_the_best_that_can_be(
    architecture: Callable[[str], Path],
    name: str,
    device: torch.device,
    precision: str,
    head: int,
    want: tuple[str, ...],
) -> None:
    found = config(architecture, name, head_dim=head)
    assert candidates("auto", found, device=device, precision=precision) == want


@pytest.mark.parametrize(
    ("wanted", "name", "device", "precision", "says"),
    [
        ("flash", "llama", CPU, "bf16", "flash needs a CUDA GPU, and the model is on cpu"),
        ("flex", "llama", CPU, "bf16", "flex needs a CUDA GPU"),
        ("flash", "llama", GPU, "fp32", "flash needs precision=bf16, not fp32"),
        ("flash", "gemma2", GPU, "bf16", "cannot cap scores"),
        ("sdpa", "llama", CPU, "fp32", "got 'sdpa'; allowed are auto, segments, flash, flex"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    architecture: Callable[[str], Path],
    wanted: str,
    name: str,
    device: torch.device,
    precision: str,
    says: str,
) -> None:
    found = config(architecture, name)
    with pytest.raises(AlignError, match=says):
        candidates(wanted, found, device=device, precision=precision)
    if wanted == "flex":
        assert candidates(wanted, found, device=GPU, precision="fp32") == ("flex",)


def aligned_to_the_first_key(query: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
    """The flash kernel before its release 2.1: query i sees the first i + 1 keys."""
    key, value, queries, keys, *longest = more
    first = zip(pairwise(queries.tolist()), keys.tolist(), strict=False)
    taken = torch.cat([torch.arange(c, c + b - a) for (a, b), c in first])
    return one_after_another(query, key[taken], value[taken], queries, queries, *longest, **options)


def scaled(*inputs: Any, scale: float, **options: Any) -> torch.Tensor:
    return one_after_another(*inputs, scale=1.5 * scale, **options)


def without_a_gradient(query: torch.Tensor, key: torch.Tensor, *more: Any, **options: Any) -> Any:
    return one_after_another(query, key.detach() + 0 * key, *more, **options)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (aligned_to_the_first_key, "its output is wrong by"),
        (scaled, "its output is wrong by"),
        (without_a_gradient, "its gradient of keys is wrong by"),
        (varlen.kernel(), ""),  # which runs on a GPU only
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_passed_over_with_a_line(
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: Any,
    says: str,
) -> None:
    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    monkeypatch.setattr(backends, "candidates", lambda *_, **__: ("flash", "segments"))
    settle_backend(policy, "auto")
    assert policy.attention == "segments"
    told = "".join(capsys.readouterr())
    assert "attention: flash does not work here, taking segments" in told
    assert says in told
    monkeypatch.setattr(backends, "candidates", lambda *_, **__: ("flash",))
    with pytest.raises(AlignError, match="attention: flash does not work here"):
        settle_backend(policy, "flash")


def test_a_kernel_that_is_right_is_taken_and_used(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[torch.Tensor] = []

    def counted(query: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        calls.append(query)
        return one_after_another(query, *more, **options)

    monkeypatch.setattr(varlen, "kernel", lambda: counted)
    monkeypatch.setattr(backends, "candidates", lambda *_, **__: ("flash", "segments"))
    settle_backend(policy, "auto")
    assert policy.attention == "flash"
    assert policy.inner.config._attn_implementation == attention.BACKENDS["flash"]
    assert "does not work" not in "".join(capsys.readouterr())
    assert {t.dtype for t in calls} == {torch.bfloat16}  # what such a kernel takes
    calls.clear()
    segment = (Segment(0, 0, 4),)
    ids = torch.arange(4)[None]
    policy.backbone(input_ids=ids, position_ids=ids, use_cache=False, segments=segment)
    assert len(calls) == policy.inner.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_flex_proves_right(
    architecture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By torch's plain form of it; with a window and capped scores in Gemma 2."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()  # its plain form compiles too, and counts other tests' shapes
    found = config(architecture, name, head_dim=16)
    assert bool(getattr(found, "sliding_window", None)) == (name == "gemma2")
    prove("flex", found, CPU)


def test_a_torch_whose_kernel_lacks_an_argument_is_named(
    architecture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "kernel", lambda: lambda query, key, value, is_causal: None)
    found = config(architecture, "llama")
    assert candidates("auto", found, device=GPU, precision="bf16") == ("segments",)
    with pytest.raises(AlignError, match="flash needs a newer torch"):
        candidates("flash", found, device=GPU, precision="bf16")


def test_a_model_whose_attention_cannot_be_changed_says_so(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(policy.inner), "set_attn_implementation", lambda *_: None)
    with pytest.raises(RuntimeError, match="does not let its attention be changed"):
        policy.attention = "flex"


def test_one_graph_of_flex_serves_every_window_and_depth() -> None:
    """Else torch compiles again for each, and gives up after some."""
    closures = set()
    for segments in (backends.TRIAL[:1], backends.TRIAL):
        for window in (None, 7):
            mask = flex.block_mask(segments, 1, segments[-1].stop, window, CPU).mask_mod
            plain = [c.cell_contents for c in mask.__closure__ or ()]
            closures.add(tuple(x for x in plain if not isinstance(x, torch.Tensor)))
    assert closures == {()}
