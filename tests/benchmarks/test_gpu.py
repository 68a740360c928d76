"""The GPU's proof in its small form: real cases on a CPU, and a failure that ends only itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_cases


def test_stages_are_measured(tmp_path: Path) -> None:
    case = {"part": "0.6b", "folder": str(tmp_path), "small": True}
    made = gpu_cases.run({**case, "case": "make"})
    # embeddings 5,000 x 64, tied; two layers of 4 + 2 + 2 heads of 16 (q, k, v), their output, the
    # MLP 3 x 64 x 128, norms: 2 x 16 of the heads, 2 x 64; the last norm
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128 + 32 + 128
    assert made["parameters"] == 5000 * 64 + 2 * layer + 64
    for name in ("rm-lora", "ppo-lora"):  # the second is rewarded by the first
        found = gpu_cases.run({**case, "case": name})
        assert found["tokens_per_second"] > 0
        assert found["estimate_ratio"] == pytest.approx(found["estimate_gib"] / found["peak_gib"])
    assert found["first_ratio_error"] < 1e-4
    drawn = gpu_cases.run({**case, "case": "sample"})
    assert drawn["sampled_tokens"] == 4 * 8


def test_frozen_weights_need_fewer_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_cases.run({"part": "0.6b", "folder": str(tmp_path), "small": True, "case": "make"})
    asked = []

    def seconds(tokens: int, inputs: int, outputs: int, passes: int, *_: object) -> tuple:
        asked.append(passes)
        return 0.5, 0.5

    monkeypatch.setattr(gpu_cases, "seconds_of", seconds)
    monkeypatch.setattr(gpu_cases, "machine", lambda small: {"tflops": 1.0})
    for name, passes in {"sft-full": 3, "sft-lora": 2, "dpo-full": 4, "dpo-lora": 3}.items():
        asked.clear()
        found = gpu_cases._against_products(tmp_path / "0.6b", name, tokens=100, speed=50.0)
        assert set(asked) == {passes}
        # seven products a layer, two layers, half a second each: 7 s for 100 tokens, at 50 a second
        assert found["of_products"] == pytest.approx(14 * 0.5 / 100 * 50.0)


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_kernel_that_is_wrong_is_found(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cases, "FAMILIES", {"llama": gpu_cases.FAMILIES["llama"]})
    measured = gpu_cases._loss_and_gradient

    def off(policy):  # type: ignore[no-untyped-def]
        loss, gradient = measured(policy)
        return loss, gradient * (factor if policy.attention == "flash" else 1.0)

    monkeypatch.setattr(gpu_cases, "_loss_and_gradient", off)
    monkeypatch.setattr(
        "align.models.attention.choose.candidates", lambda *_, **__: ("flash", "segments")
    )
    from align.models import load_policy

    class Flash:
        """A policy whose attention calls itself by another name."""

        def __init__(self, policy):  # type: ignore[no-untyped-def]
            self.policy = policy

        def __getattr__(self, name):  # type: ignore[no-untyped-def]
            return "flash" if name == "attention" else getattr(self.policy, name)

        def __call__(self, *args, **options):  # type: ignore[no-untyped-def]
            return self.policy(*args, **options)

    def load(path, *, attention="auto", **options):  # type: ignore[no-untyped-def]
        loaded = load_policy(path, **options)
        return Flash(loaded) if attention == "flash" else loaded

    monkeypatch.setattr("align.models.load_policy", load)
    with pytest.raises(SystemExit, match="llama flash: gradients or losses are off"):
        gpu_cases.kernels(tmp_path, small=True)


def test_a_failure_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the stage fails for want of its model; TRL is not there
    monkeypatch.setattr(gpu, "PARTS", {"4b": ("sft-full",), "trl": ("trl-sft",)})
    assert gpu.main(["--small", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [(row["case"], row["status"]) for row in found] == [
        ("sft-full", "failed"),
        ("trl-sft", "not run"),
    ]
    assert "4b" in found[0]["reason"]
    assert found[1]["reason"] == "TRL is not installed"
    assert "**failed**" in (tmp_path / "table.md").read_text("utf-8")
    assert "no such part" not in capsys.readouterr().err


def test_the_budget_ends_the_run(tmp_path: Path) -> None:
    assert gpu.main(["--budget", "1", "--output", str(tmp_path), "kernels"]) == 0
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found == [
        {"part": "kernels", "case": "kernels", "status": "not run", "reason": "the time is used up"}
    ]
