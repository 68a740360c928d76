"""One case of `benchmarks.gpu`: ``python -m benchmarks.gpu_cases CASE.json RESULT.json``.

A stage runs through `align`'s command line, as a user would run it. Its tokens/s are the median
over the steps after the warm-up, its peak is what torch had allocated on the card (on a CPU the
largest resident set), and it stands beside the time of the step's bare matrix products.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.data import preference_rows, write_jsonl
from benchmarks.limit import linear_shapes, seconds_of
from benchmarks.measure import WARM_UP, Job, peak_gib

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models" / "tiny"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen3's, by their published config.json."""
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5000}  # fmt: skip
POSITIONS = 4096

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "mistral": ("MistralConfig", {"sliding_window": 100}),
    "gemma2": ("Gemma2Config", {"head_dim": 64, "sliding_window": 100}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
}
"""Whose kernels are compared: full, normed, windowed and capped attention, fused projections."""


def run(case: dict[str, Any]) -> dict[str, Any]:
    name, folder = case["case"], Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    small = case["small"]
    if name == "machine":
        return machine(small)
    if name == "kernels":
        return kernels(folder, small)
    if name == "tiny":
        return tiny_suite(folder, small)
    if name.startswith("trl-"):
        return beside_trl(folder, name.removeprefix("trl-"), small)
    place = folder / case["part"]
    if name == "make":
        return make(place, case["part"], small)
    if name == "sample":
        return sample(place, small)
    return stage(place, name, small)


def machine(small: bool) -> dict[str, Any]:
    """The card, the versions, and how fast it multiplies large bf16 matrices."""
    size = 256 if small else 8192
    seconds = min(seconds_of(size, size, size, 3, torch.bfloat16, DEVICE)[0] for _ in range(3))
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if CUDA else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "tflops": 3 * 2 * size**3 / seconds / 1e12,
    }
    if CUDA:
        found["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    return found


def kernels(folder: Path, small: bool) -> dict[str, Any]:
    """Largest relative error of loss and gradients of each family's kernel, against ``segments``.

    ``segments`` in float32 is the truth; its own error in bf16 is what a kernel is measured by.
    """
    from align.models import load_policy
    from align.models.attention.choose import candidates

    worst: dict[str, Any] = {}
    for family in FAMILIES:
        path = _family(folder / "kernels" / family, family, small)
        truth = _loss_and_gradient(load_policy(path, device=DEVICE, precision="fp32"))
        config = load_policy(path, device=DEVICE, precision="fp32").inner.config
        tried = dict.fromkeys(
            ("segments", *candidates("auto", config, device=DEVICE, precision="bf16"))
        )
        for backend in tried:
            policy = load_policy(path, device=DEVICE, precision="bf16", attention=backend)
            loss, gradient = _loss_and_gradient(policy)
            worst[f"{family} {backend}"] = {
                "loss": abs(loss - truth[0]) / abs(truth[0]),
                "gradient": ((gradient - truth[1]).norm() / truth[1].norm()).item(),
            }
    wrong = [
        name
        for name, error in worst.items()
        # NaN is not below anything
        if not all(
            error[what] <= max(3 * worst[f"{name.split()[0]} segments"][what], floor)
            for what, floor in {"loss": 1e-3, "gradient": 0.0}.items()
        )
    ]
    if wrong:
        raise SystemExit(
            f"kernels: {', '.join(wrong)}: gradients or losses are off: {json.dumps(worst)}"
        )
    compared = {name: error["gradient"] for name, error in worst.items()}
    return {"kernels": len(compared), "gradient_error": max(compared.values()), "details": worst}


def _loss_and_gradient(policy: Any) -> tuple[float, torch.Tensor]:
    from align.data.tokens.packing import pack
    from benchmarks.gpu_rows import groups

    policy.train()
    policy.zero_grad(set_to_none=True)
    total = 0.0
    for batch in pack(groups(policy.inner.config.vocab_size), tokens_per_microbatch=2048):
        loss = -policy(batch.to(DEVICE)).logprobs.mean()
        loss.backward()
        total += loss.item()
    grads = [p.grad.flatten().float() for p in policy.parameters() if p.grad is not None]
    return total, torch.cat(grads)


def make(place: Path, size: str, small: bool) -> dict[str, Any]:
    """Random weights of a shape in bf16, and rows of real text for every stage."""
    from transformers import AutoTokenizer, Qwen3Config

    shape = {**COMMON, **SHAPES[size], **(SMALL if small else {})}
    started = time.monotonic()
    parameters = _save(place / "model", Qwen3Config, shape)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    pairs = list(preference_rows(tokenizer, 16 if small else 512, seed=0))
    write_jsonl(place / "pairs.jsonl", pairs)
    write_jsonl(
        place / "sft.jsonl", ({"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs)
    )
    write_jsonl(place / "prompts.jsonl", ({"prompt": r["prompt"]} for r in pairs))
    return {"parameters": parameters, "seconds": time.monotonic() - started}


def _save(folder: Path, config_class: Any, shape: dict[str, Any]) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("eos", "pad")}
    config = config_class(**{"max_position_embeddings": POSITIONS, **shape, **ids})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _family(folder: Path, name: str, small: bool) -> str:
    import transformers

    config_class, options = FAMILIES[name]
    width = 64 if small else 512
    shape = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128),
        "vocab_size": 5000,
    }  # fmt: skip
    _save(folder, getattr(transformers, config_class), {**shape, **options})
    return str(folder)


# ---------------------------------------------------------------- stages


STEPS = 5
LORA = {"r": 16, "alpha": 32}


def recipe(place: Path, name: str, small: bool) -> dict[str, Any]:
    """The recipe of ``sft-full``, ``ppo-lora`` and so on, with `align`'s own settings for speed."""
    command, _, kind = name.partition("-")
    rows = {"sft": "sft", "ppo": "prompts"}.get(command, "pairs")
    tokens = 512 if small else 8192
    made: dict[str, Any] = {
        "model": str(place / "model"),
        "output_dir": str(place / name),
        "overwrite": True,
        "trackers": [],
        "data": {"train": str(place / f"{rows}.jsonl"), "test_fraction": 0},
        "optim": {"lr": 1e-6, "schedule": "constant", "warmup_fraction": 0},
    }
    if kind == "lora":
        made["lora"] = LORA
    if command == "ppo":
        made |= {
            "reward": {"model": str(place / f"rm-{kind}" / "model")},
            "ppo": {"iterations": 3, "rollout_batch": 4 if small else 64, "epochs": 1},
            "generation": {"max_new_tokens": 8 if small else 64, "samples_per_prompt": 2},
            "train": {"tokens_per_microbatch": tokens},
        }
        return made
    # about 180 tokens of an SFT row and 250 of a pair fill two microbatches
    minibatch = 2 if small else 64
    made["train"] = {
        "max_steps": STEPS, "minibatch": minibatch, "tokens_per_microbatch": tokens, "log_every": 1,
    }  # fmt: skip
    if command == "dpo":
        made["dpo"] = {"reference": "adapter_off" if kind == "lora" else "online"}
    return made


def stage(place: Path, name: str, small: bool) -> dict[str, Any]:
    """Run a stage; its speed and memory beside the bare products and `align check`'s estimate."""
    command = name.partition("-")[0]
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(recipe(place, name, small)), encoding="utf-8")  # JSON is YAML
    estimate = _estimate(path, command)
    if CUDA:
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
        if estimate is not None and estimate > room:
            raise SystemExit(f"does not fit: {estimate:.0f} GiB by `align check` of {room:.0f}")
        torch.cuda.reset_peak_memory_stats()
    _align(command, str(path))
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else peak_gib()
    lines = (place / name / "metrics.jsonl").read_text("utf-8").splitlines()
    logged = [row for row in map(json.loads, lines) if "tokens" in row]
    found: dict[str, Any] = {"peak_gib": peak}
    if estimate is not None:
        found |= {"estimate_gib": estimate, "estimate_ratio": estimate / peak}
    manifest = json.loads((place / name / "manifest.json").read_text("utf-8"))
    found["attention"] = manifest.get("attention", "")
    if command == "ppo":
        last = logged[-1]
        kept = ("sample_seconds", "update_seconds", "first_ratio_error", "tokens_per_second")
        return {**found, **{key: last[key] for key in kept if key in last}}
    steps = logged[WARM_UP:]
    found["tokens_per_second"] = median(row["tokens_per_second"] for row in steps)
    tokens = round(median(row["tokens"] for row in steps))
    return found | _against_products(place, name, tokens, found["tokens_per_second"])


def _against_products(place: Path, name: str, tokens: int, speed: float) -> dict[str, Any]:
    """MFU by the card's own large products, and the share of a step that bare products would take.

    Frozen weights have no gradient: with LoRA two products a layer instead of three; a reference
    is one more. The head's products are left out, as which tokens are counted differs by stage.
    """
    command, _, kind = name.partition("-")
    passes = (2 if kind == "lora" else 3) + (command == "dpo")
    body, _ = linear_shapes(str(place / "model"))
    part = min(tokens, recipe(place, name, False)["train"]["tokens_per_microbatch"])
    times = [n * seconds_of(part, *shape, passes, torch.bfloat16, DEVICE)[0]
             for shape, n in body.items()]  # fmt: skip
    work = sum(2 * n * inputs * outputs * passes for (inputs, outputs), n in body.items())
    peak = machine(small=not CUDA)["tflops"] * 1e12
    return {"mfu": work * speed / peak, "of_products": sum(times) / part * speed}


def sample(place: Path, small: bool) -> dict[str, Any]:
    """Tokens/s of the one sampler that every stage draws from; random weights seldom end."""
    from align.config.sections import GenerationOptions
    from align.models import load_policy
    from align.rollout.engine import sample as draw

    policy = load_policy(str(place / "model"), device=DEVICE, frozen=True)
    count, tokens = (4, 8) if small else (128, 128)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(5, 4000, (100,), generator=generator).numpy().astype("int32")
        for _ in range(count)
    ]
    options = GenerationOptions(max_new_tokens=tokens, slots=count)
    found: dict[str, Any] = {}
    for name in ("warm_up", "measured"):
        started = time.monotonic()
        rollout = draw(policy, prompts, options, end_ids=(), seed=0, prefill_tokens=8192)
        found[name] = time.monotonic() - started
    drawn = int(rollout.response_mask.sum())
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else peak_gib()
    return {
        "tokens_per_second": drawn / found["measured"],
        "peak_gib": peak,
        "attention": policy.attention,
        "slots": count,
        "sampled_tokens": drawn,
    }


def tiny_suite(folder: Path, small: bool) -> dict[str, Any]:
    """The shipped tiny suite end to end, with what each stage says of itself at its end."""
    few = ["data.max_train_rows=32"] if small else []
    paths = {name: folder / "tiny" / name for name in ("sft", "pairs", "rm", "ppo", "dpo")}
    sft, pairs = f"{paths['sft']}/model", f"{paths['pairs']}/pairs.jsonl"
    own = {
        "sft": ["sft", "tiny/sft"],
        "pairs": ["generate", "tiny/pairs", f"model={sft}"],
        "rm": ["rm", "tiny/rm", f"model={sft}", f"data.train={pairs}"],
        "ppo": ["ppo", "tiny/ppo", f"model={sft}"],
        "dpo": ["dpo", "tiny/dpo", f"model={sft}", f"data.train={pairs}"],
    }
    own["ppo"] += [f"reward.0.model={paths['rm']}/model"]
    if small:
        own["ppo"] += ["ppo.iterations=1", "ppo.rollout_batch=8"]
    found: dict[str, Any] = {}
    for name, command in own.items():
        started = time.monotonic()
        _align(*command, *few, f"output_dir={paths[name]}", "overwrite=true")
        found[f"{name}_seconds"] = time.monotonic() - started
    manifests = {
        name: json.loads((path / "manifest.json").read_text("utf-8"))
        for name, path in paths.items()
    }
    found["rm_accuracy"] = manifests["rm"]["held_out"]["accuracy"]
    found["sft_loss"] = manifests["sft"]["held_out"]["loss"]
    return found


def beside_trl(folder: Path, command: str, small: bool) -> dict[str, Any]:
    """TRL 1.16 on the 0.6B shape and the same rows, bf16, no checkpointing, its own trainer."""
    from benchmarks import trl_stage

    place = folder / "0.6b"
    rows = {"sft": "sft"}.get(command, "pairs")
    batch = 2 if small else 64
    job = Job(
        stage=command, model=str(place / "model"), reward_model=str(place / "model"),
        data=str(place / f"{rows}.jsonl"), folder=str(place / f"trl-{command}"),
        batch=batch, steps=STEPS, lr=1e-6, settings={"bf16": CUDA, "microbatch": min(batch, 16)},
    )  # fmt: skip
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    found = trl_stage.measure(job)
    ours = json.loads((place / f"{command}-full" / "manifest.json").read_text("utf-8"))
    lines = (place / f"{command}-full" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "tokens" in row][WARM_UP:]
    seconds = median(row["tokens"] / row["tokens_per_second"] for row in steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else peak_gib()
    return {
        "seconds_a_step": median(found["seconds"]),
        "times_align": median(found["seconds"]) / seconds,
        "peak_gib": peak,
        "attention": ours.get("attention", ""),
    }


# ---------------------------------------------------------------- align, from the command line


def _align(*arguments: str) -> None:
    from align import cli

    if cli.main([*arguments, "--debug"]):
        raise SystemExit(f"align {' '.join(arguments[:2])} failed; see its line above")


def _estimate(path: Path, command: str) -> float | None:
    """GiB that `align check` says the run will need."""
    from align import cli

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["check", str(path), "--stage", command])
    if code:
        raise SystemExit(f"align check refuses {path.name}; see its line above")
    found = re.search(r"^memory .*?([\d.]+) GB", out.getvalue(), re.MULTILINE)
    return float(found[1]) * 1e9 / 2**30 if found else None


if __name__ == "__main__":
    asked, answer = Path(sys.argv[1]), Path(sys.argv[2])
    result = run(json.loads(asked.read_text("utf-8")))
    answer.write_text(json.dumps(result), encoding="utf-8")
