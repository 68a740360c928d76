"""PPO from several seeds, against the SFT model that all of them start from.

    python -m benchmarks.seeds tiny                     # seeds 0 to 4 of the shipped recipe
    python -m benchmarks.seeds tiny ppo.iterations=20 --seeds 0 1 2 3 4 5 6

Runs `align ppo SUITE/ppo` once for each seed and then `align eval SUITE/eval` over SFT and all of
them, on verses of held-out books. Gold is chrF against the references of those verses, which no
run was paid for: of samples at the training temperature, and of greedy answers. A seed fails where
its samples score below SFT's. Exits with 1 if one does. What is done already is not run again.
Needs `make sft rm` of the suite. Published: two of four seeds ended below (arXiv:2403.17031).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.base.progress import say, table
from align.evaluation.verdict import outcome
from tools.trust import Trust

ROOT = Path(__file__).parents[1]
GOLD = {"sample_chrf": "chrF of samples", "chrf": "chrF, greedy"}
BASE = "sft"


def main() -> None:
    args = _arguments()
    folder = Path(args.folder) / args.suite / ("_".join(sorted(args.overrides)) or "shipped")
    models = {BASE: f"runs/{args.suite}/sft/model"}
    for seed in args.seeds:
        run = folder / f"ppo-{seed}"
        models[f"ppo-{seed}"] = str(run / "model")
        if not _is_done(run, models[BASE]):
            options = [f"seed={seed}", f"output_dir={run}", "overwrite=true", *args.overrides]
            _align("ppo", f"{args.suite}/ppo", *options)
    evaluated = folder / "eval" / "eval.json"
    if not _covers(evaluated, models):
        named = ", ".join(f"{name}: {path}" for name, path in models.items())
        options = [f"models={{{named}}}", f"output_dir={folder / 'eval'}", "overwrite=true"]
        _align("eval", f"{args.suite}/eval", *options, "best_of_n=null", "preferences=null")
    results = json.loads(evaluated.read_text(encoding="utf-8"))
    found = against_base(results)
    found = {name: found[name] for name in models if name in found}
    unmeasured = [n for n in models if n != BASE and found.get(n, {}).keys() != GOLD.keys()]
    if unmeasured:
        raise SystemExit(
            f"benchmarks.seeds: {evaluated}: {', '.join(unmeasured)} not measured by "
            f"{' and '.join(GOLD)}; {args.suite}/eval needs sampling, references and chrf"
        )
    say(table(rows(found), title=f"{args.suite}: PPO of {len(found)} seeds against {BASE}"))
    below = [name for name, gold in found.items() if gold["sample_chrf"]["difference"] < 0]
    say(f"  below {BASE} in chrF of samples: {', '.join(below) or 'none'}")
    trust = Trust("benchmarks/seeds.py")
    for name, gold in found.items():
        trust.row(
            "seeds",
            f"{args.suite}, {name}" + "".join(f", {o}" for o in args.overrides),
            found="; ".join(f"{GOLD[m]} {_told(c)}" for m, c in gold.items()),
            wanted=f"not below {BASE}",
        )
    raise SystemExit(1 if below else 0)


def _is_done(run: Path, base: str) -> bool:
    """Whether this seed was trained, and from the SFT model as it is now."""
    made, start = run / "model" / "config.json", Path(base) / "config.json"
    return made.is_file() and (not start.is_file() or start.stat().st_mtime <= made.stat().st_mtime)


def _covers(evaluated: Path, models: Mapping[str, str]) -> bool:
    """Whether all of these models were evaluated, as they are now."""
    if not evaluated.is_file():
        return False
    found = json.loads(evaluated.read_text(encoding="utf-8"))["models"]
    when = evaluated.stat().st_mtime
    return models.keys() <= {m["name"] for m in found} and all(
        Path(path, "config.json").stat().st_mtime <= when for path in models.values()
    )


def against_base(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> gold metric -> its value, the difference to SFT, and p."""
    values = {m["name"]: {"sample_chrf": m["sample_chrf_mean"], "chrf": m["chrf"]}
              for m in results["models"] if "sample_chrf_mean" in m}  # fmt: skip
    found: dict[str, dict[str, dict[str, float]]] = {}
    for c in results["comparisons"]:
        if BASE in (c["a"], c["b"]) and c["metric"] in GOLD and values.keys() >= {c["a"], c["b"]}:
            other, sign = (c["a"], 1) if c["b"] == BASE else (c["b"], -1)
            value = values[other][c["metric"]]
            gold = {"value": value, "difference": sign * c["difference"], "p": c["p"]}
            found.setdefault(other, {})[c["metric"]] = gold
    return found


def verdict(metric: str, difference: float, p: float) -> str:
    words = {"better": "better", "worse": "BELOW", "": "as good"}
    return words[outcome(metric, difference, p)]


def rows(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """Of the closing table: a line for each seed."""
    heading = ["model", *(f"{name} - {BASE}" for name in GOLD.values()), "samples are", "greedy is"]
    return [heading] + [
        [
            name,
            *(_told(gold[metric]) for metric in GOLD),
            *(verdict(metric, gold[metric]["difference"], gold[metric]["p"]) for metric in GOLD),
        ]
        for name, gold in found.items()
    ]


def _told(gold: Mapping[str, float]) -> str:
    return f"{gold['value']:.1f} ({gold['difference']:+.1f}, p = {gold['p']:.3f})"


def _align(command: str, recipe: str, *overrides: str) -> None:
    argv = [sys.executable, "-m", "align", command, recipe, *overrides]
    say("$ " + " ".join(["align", *argv[3:]]))
    code = subprocess.run(argv).returncode
    if code:
        raise SystemExit(f"benchmarks.seeds: align {command} {recipe} ended with {code}")


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", help="tiny or smollm2: whose recipes are run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", default="runs/seeds", help="where the runs go")
    args, overrides = parser.parse_known_args(argv)
    unknown = [o for o in overrides if "=" not in o or o.startswith("-")]
    if unknown:
        parser.error(f"{unknown[0]}: wanted key=value, such as ppo.iterations=20")
    args.overrides = overrides
    return args


if __name__ == "__main__":
    main()
