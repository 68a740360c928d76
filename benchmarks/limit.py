"""The limit: how long the bare matrix products of a step take, and nothing else.

Of every linear layer of the model: the product of the forward pass and both of the backward pass,
for the tokens that have to go through the model; of the head, for the counted tokens only. A stage
that also runs a frozen reference has the forward products once more. Outputs are preallocated, the
dtype is the one that `align` multiplies in here. Attention, norms, the softmax, the optimizer and
the data are not in it, so no program reaches 1.
"""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.models.precision import resolve_precision
from benchmarks.measure import Job, main

REPEATS = 5
CPU = torch.device("cpu")


def linear_shapes(model: str) -> tuple[Counter[tuple[int, int]], tuple[int, int]]:
    """``(inputs, outputs)`` of the backbone's linear layers with their number, and of the head."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = lm.get_output_embeddings()
    body: Counter[tuple[int, int]] = Counter()
    for module in lm.modules():
        # transformers' Conv1D of GPT-2 keeps its weight the other way round; the cost is the same
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head:
            rows, columns = module.weight.shape
            body[columns, rows] += 1
    return body, (head.weight.shape[1], head.weight.shape[0])


def seconds_of(
    tokens: int,
    inputs: int,
    outputs: int,
    passes: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> tuple[float, float]:
    """Median time of one layer's products: 3 are a training step, 4 with a reference forward.

    Returns:
        ``(wall, cpu)``, seconds.
    """
    x, weight, grad = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    forward, grad_x, grad_weight = (torch.empty_like(t) for t in (grad, x, weight))
    wall, cpu = [], []
    for _ in range(REPEATS):
        started, spent = time.perf_counter(), time.process_time()
        for _ in range(passes - 2):
            torch.mm(x, weight.T, out=forward)
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.T, x, out=grad_weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    return median(wall), median(cpu)


def measure(job: Job) -> dict[str, Any]:
    """Seconds of the mean step of ``settings.tokens``, a (tokens, counted) for every step."""
    bf16 = resolve_precision("auto", torch.device("cpu")) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    steps = job.settings["tokens"]
    tokens = round(sum(t for t, _ in steps) / len(steps))
    counted = round(sum(c for _, c in steps) / len(steps))
    passes = 4 if job.stage == "dpo" else 3
    body, head = linear_shapes(job.model)
    times = [(n, *seconds_of(tokens, *shape, passes, dtype)) for shape, n in body.items()]
    if job.stage != "rm":
        times.append((1, *seconds_of(counted, *head, passes, dtype)))
    return {
        "seconds": [sum(n * wall for n, wall, _ in times)] * len(steps),
        "cpu_seconds": [sum(n * cpu for n, _, cpu in times)] * len(steps),
        "dtype": str(dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    main(measure)
