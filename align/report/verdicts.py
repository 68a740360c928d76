"""Sum up an evaluation in sentences: better or not, by how much, at what cost, with what doubts."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from align.evaluation.metrics import METRICS
from align.evaluation.verdict import (
    ALPHA,
    deciding_p,
    outcome,
    p_in_words,
    short_verdict,
    verdict,
)
from align.report.runs import RunRecord

NAMES = {key: metric.name or metric.title for key, metric in METRICS.items()}
"""Metrics in a sentence."""
# metrics listed first, if measured
EVIDENCE = ("reward", "gold", "sample_reward", "sample_gold", "bleu", "chrf", "sample_chrf")
# the headline's metric, in order of preference: gold rewards before the optimised one
TRUSTED = ("sample_gold", "gold", "sample_chrf", "chrf", "bleu", "sample_reward", "reward")


@dataclass(frozen=True)
class Evidence:
    """One paired difference, in words too; ``outcome``: better, worse, more, less or ""."""

    name: str
    difference: float
    ci95: tuple[float, ...] | None
    says: str = ""
    outcome: str = ""


@dataclass
class Verdict:
    """One model against its baseline; ``warnings`` are reasons to doubt an improvement."""

    title: str
    baseline: str | None = None
    headline: str = ""
    evidence: list[Evidence] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verdicts(run: RunRecord) -> list[Verdict]:
    """Compare every model of an evaluation with its reference, and judge the reward."""
    evaluation = run.evaluation or {}
    models = _over_seeds(evaluation.get("models", []))
    baseline = (baseline_of(run) or "").partition("#")[0] or None
    found = []
    for name in models:
        if name != baseline:
            told = _against(evaluation, models, name, baseline)
            found += [told] if told.evidence or told.sentences else []
    reward = evaluation.get("reward_model")
    if reward:
        found.append(_of_reward(reward))
    return found


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Average ``ppo#0`` and ``ppo#1`` as one ppo, over the numbers that all seeds have."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].partition("#")[0], []).append(row)
    keys = ("kl", "kl_per_token", "length_mean")
    return {
        name: {
            key: fmean(row[key] for row in seeds)
            for key in keys
            if all(row.get(key) is not None for row in seeds)
        }
        for name, seeds in groups.items()
    }


def baseline_of(run: RunRecord) -> str | None:
    """Choose the baseline: the reference of KL, else the first model."""
    models = (run.evaluation or {}).get("models", [])
    reference = run.config.get("reference_model")
    same = [m["name"] for m in models if reference and m.get("model") == reference]
    return (same or [m["name"] for m in models] or [None])[0]


def _against(
    evaluation: dict[str, Any], models: dict[str, Any], name: str, baseline: str | None
) -> Verdict:
    told = Verdict(f"{name} against {baseline}", baseline)
    pair = name, baseline
    listed = evaluation.get("comparisons", [])
    tests = {c["metric"]: turned(c) for c in listed if (c["b"], c["a"]) == pair}
    tests |= {c["metric"]: c for c in listed if (c["a"], c["b"]) == pair}
    told.headline = _headline(tests, models[name])
    for metric in (m for m in EVIDENCE if m in tests):
        test = tests[metric]
        found = metric, test["difference"], deciding_p(test)
        told.evidence.append(
            Evidence(
                capital(NAMES[metric]),
                test["difference"],
                test["ci95"] and tuple(test["ci95"]),
                short_verdict(*found),
                outcome(*found),
            )
        )
        controlled = test.get("at_equal_length")
        if controlled:
            interval = tuple(controlled["ci95"])
            told.evidence.append(Evidence("at equal length", controlled["difference"], interval))
            if _gained(test) and interval[0] <= 0:
                told.warnings.append(
                    f"The gain in {NAMES[metric]} is not certain at equal length: "
                    "longer answers may be all that was learnt."
                )
    told.sentences += _cost(models[name], models.get(baseline or "", {}))
    for proxy, gold in (("reward", "gold"), ("sample_reward", "sample_gold")):
        if proxy in tests and gold in tests and _gained(tests[proxy]):
            if deciding_p(tests[gold]) < ALPHA and tests[gold]["difference"] < 0:
                told.warnings.append(
                    f"The {NAMES[proxy]} rose and the {NAMES[gold]} fell: over-optimised."
                )
            elif not _gained(tests[gold]):
                told.warnings.append(
                    f"The {NAMES[proxy]} rose; that the {NAMES[gold]} did is not shown."
                )
    return told


def _headline(tests: dict[str, dict[str, Any]], model: dict[str, Any]) -> str:
    """Say in one line by which metric the model is better, by how much, and for how many nats."""
    metric = next((m for m in TRUSTED if m in tests), None)
    if metric is None:
        return ""
    test, name = tests[metric], NAMES[metric]
    p = deciding_p(test)
    word = outcome(metric, test["difference"], p)
    cost = "" if model.get("kl") is None else f" for {model['kl']:.2f} nats"
    if word:
        return f"{capital(word)} by {name}: {test['difference']:+.3g}{cost}, {p_in_words(p)}"
    return f"{capital(name)}: {test.get('verdict') or p_in_words(p)}"


def turned(test: dict[str, Any]) -> dict[str, Any]:
    """Reverse a comparison: b against a."""
    found = test | {"a": test["b"], "b": test["a"]} | _negated(test)
    if test.get("at_equal_length"):
        found["at_equal_length"] = test["at_equal_length"] | _negated(test["at_equal_length"])
    if "num_seeds" in test:
        found["num_seeds"] = test["num_seeds"][::-1]
    if "verdict" in test:
        found["verdict"] = verdict(
            test["metric"],
            -test["difference"],
            deciding_p(test),
            num_prompts=test["num_prompts"],
            needed=test["num_prompts_needed"],
            num_seeds=tuple(found.get("num_seeds", (1, 1))),
            num_differing=test.get("num_differing"),
            least_p=float(test["verdict"].startswith("too few")),
        )
    return found


def _negated(figures: dict[str, Any]) -> dict[str, Any]:
    ends = figures["ci95"] and [-figures["ci95"][1], -figures["ci95"][0]]
    return {"difference": -figures["difference"], "ci95": ends}


def capital(text: str) -> str:
    """Capitalise the start of a sentence, but keep chrF."""
    return text[:1].upper() + text[1:] if text.islower() else text


def _gained(test: dict[str, Any]) -> bool:
    return bool(deciding_p(test) < ALPHA and test["difference"] > 0)


def _cost(model: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    found = []
    if model.get("kl") is not None:
        text = f"Cost: {model['kl']:.2f} nats of KL per response"
        if model.get("kl_per_token") is not None:
            text += f", {model['kl_per_token']:.3f} per token"
        found.append(f"{text}.")
    length, before = model.get("length_mean"), baseline.get("length_mean")
    if length is not None and before:
        found.append(
            f"Length: {length:.1f} tokens against {before:.1f} ({length / before - 1:+.0%})."
        )
    return found


def _of_reward(found: dict[str, Any]) -> Verdict:
    low, high = found["accuracy_ci95"]
    by_chance = ""
    if "ece_by_chance" in found:
        by_chance = f" (a calibrated reward: up to {found['ece_by_chance']:.3f} by chance)"
    told = Verdict(
        f"The reward {found['reward']}",
        sentences=[
            f"Right on {found['accuracy']:.0%} of {found['pairs']} held-out pairs "
            f"({low:.0%} to {high:.0%}); preferring the longer answer would be right on "
            f"{found['longer_wins']:.0%}.",
            f"Calibration error {found['ece']:.3f}{by_chance}; dividing its scores by "
            f"{found['temperature']:.2f} would make it {found['ece_at_temperature']:.3f}.",
        ],
    )
    rival = found.get("above_longer")  # files of earlier versions have no test of it
    if rival is None:
        above = low > found["longer_wins"]
    else:
        above = rival["difference"] > 0 and rival["p"] < ALPHA
    if low <= 0.5 or not above:
        told.warnings.append("It is not shown to be better than chance and than length.")
    for way, change in found["broken"].items():
        if change["preferred"] >= 0.5:
            told.warnings.append(
                f"It prefers {way} answers on {change['preferred']:.0%}: a policy will find out."
            )
    return told
