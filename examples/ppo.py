"""PPO from Python: a function of ours as the reward, beside a metric.

python examples/ppo.py [FOLDER]      about twenty seconds on a CPU
"""

import sys
from pathlib import Path

import align

ROOT = Path(__file__).parents[1]


def modern(prompts, responses, references):
    """-1 for each word of old English in a response."""
    old = {"thou", "thee", "thy", "ye", "hath", "unto", "shalt"}
    return [-float(sum(word in old for word in r.lower().split())) for r in responses]


def main(folder: str = "runs/examples/ppo") -> None:
    run = align.ppo(
        model=ROOT / "models/tiny",
        data={"train": ROOT / "data/kjv_web/prompts.jsonl", "test_fraction": 0, "max_tokens": 128},
        reward=[modern, {"metric": "chrf1", "weight": 0.1}],
        generation={"max_new_tokens": 24, "samples_per_prompt": 4},
        ppo={"iterations": 2, "rollout_batch": 16, "epochs": 2},
        kl={"coef": 0.1},
        optim={"lr": 1e-4},
        output_dir=folder,
        overwrite=True,
    )
    for row in (row for row in run.metrics if "score_mean" in row):
        print(f"iteration {row['step']}: score {row['score_mean']:.2f}, KL {row['kl']:.3f} nats")
    print(f"a sample: {run.samples[-1]['response']!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
