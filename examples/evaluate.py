"""Evaluation from Python: two models on the same prompts, compared prompt by prompt.

python examples/evaluate.py [FOLDER]      about ten seconds on a CPU
"""

import json
import sys
from pathlib import Path

import align

ROOT = Path(__file__).parents[1]


def main(folder: str = "runs/examples/eval") -> None:
    lines = (ROOT / "data/kjv_web/test.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line) for line in lines[:12]]  # prompt, references, source_text
    tiny = ROOT / "models/tiny"
    drawn = align.generate(
        model=tiny,
        data=prompts,
        generation={"temperature": 1.0, "max_new_tokens": 24},
        output_dir=f"{folder}/samples",
        overwrite=True,
    )
    outputs = Path(folder) / "sampled.jsonl"  # answers of any system can be compared
    outputs.write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "response": r["response"]}) + "\n"
            for r in drawn.samples
        )
    )
    run = align.evaluate(
        models={"greedy": tiny, "sampled": outputs},
        data=prompts,
        generation={"temperature": 0, "max_new_tokens": 24},
        num_resamples=200,
        output_dir=f"{folder}/eval",
        overwrite=True,
    )
    for test in run.evaluation["comparisons"]:
        print(f"{test['a']} - {test['b']}, {test['metric']}: {test['verdict']}")
    print(f"chrF of the greedy answers {run.held_out['greedy/chrf']:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
