"""``align data rank``: turn annotators' judgements into a leaderboard, agreement and pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.base.console import say
from align.base.files import require_writable
from align.base.progress import table
from align.commands.files import write_rows
from align.types import AlignError


def add_parser(actions: Any) -> None:
    rank = actions.add_parser("rank", help="strengths and pairs from people's comparisons")
    rank.add_argument("files", nargs="+", metavar="FILE", help="comparisons or rankings")
    rank.add_argument("--pairs", metavar="FILE", help="write preference pairs, a new .jsonl")
    rank.add_argument("--choose", choices=["all", "best_worst"], default="all", help="which pairs")
    rank.add_argument("--min-margin", type=float, default=0.0, help="nats of strength (0)")
    rank.add_argument(
        "--prior", type=float, default=0.0, help="precision of a normal prior on strengths (0)"
    )
    rank.add_argument("--seed", type=int, default=0, help="seed of Elo's resamples")
    rank.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    rank.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from align.feedback.outcomes import read_judgements
    from align.feedback.ranking import NoMaximum
    from align.feedback.report import agreement, leaderboard, preference_pairs

    if args.prior < 0 or not args.min_margin >= 0:
        raise AlignError("--prior, --min-margin: have to be 0 or more")
    if args.pairs:
        require_writable(Path(args.pairs), "--pairs", new=True)
    judgements = read_judgements(args.files)
    found: dict[str, Any] = {
        "leaderboard": leaderboard(judgements, prior=args.prior, seed=args.seed),
        "agreement": agreement(judgements),
    }
    if args.pairs:
        try:
            pairs, left_out = preference_pairs(
                judgements, choose=args.choose, min_margin=args.min_margin, prior=args.prior or 0.1
            )
        except NoMaximum as error:
            raise AlignError(f"--pairs: {error}: no two different answers to one prompt") from error
        if not pairs:
            raise AlignError(f"--pairs: no pair can be made of {len(judgements)} judgements")
        write_rows(Path(args.pairs), pairs)
        found["pairs"] = {"file": args.pairs, "rows": len(pairs), "left_out": left_out}
    if args.json:
        say(json.dumps(found, ensure_ascii=False, indent=1))
        return
    print_tables(found)


def print_tables(found: dict[str, Any]) -> None:
    if found["leaderboard"]:
        rows = [["", "strength", "95%", "on Elo's scale", "Elo", "95%", "won", "lost", "tied"]]
        for r in found["leaderboard"]:
            rows.append(
                [
                    r["name"][:40],
                    f"{r['strength']:.2f}",
                    f"{r['strength_low']:.2f} to {r['strength_high']:.2f}",
                    f"{r['scaled']:.0f}",
                    f"{r['elo']:.0f}",
                    _range((r["elo_low"], r["elo_high"]), ".0f"),
                    *(str(r[word]) for word in ("wins", "losses", "ties")),
                ]
            )
        say(table(rows, title="leaderboard (strength: nats by maximum likelihood)"))
    a = found["agreement"]
    say(f"{a['judgements']} judgements of {a['annotators']} annotators")
    alpha, ends = a["krippendorff_alpha"], _range(a["krippendorff_alpha_ci95"], ".2f")
    say(f"  Krippendorff's alpha {_number(alpha)} (1 = all agree, 0 = chance), 95% interval {ends}")
    for k in a["cohen_kappa"]:
        names = f"{k['a']} and {k['b']}"
        ends = _range(k["ci95"], ".2f")
        say(
            f"  Cohen's kappa {_number(k['kappa'])}: {names}, {k['common']} in common, "
            f"95% interval {ends}"
        )
    for name, r in a["reliability"].items():
        error = "" if r["slope"] is None else f" +- {_number(r['error'])}"
        say(f"  reliability {_number(r['slope'])}{error}: {name}")
    if "pairs" in found:
        say(f"{found['pairs']['file']}: {found['pairs']['rows']} pairs")
        for reason, count in found["pairs"]["left_out"].items():
            say(f"  left out {count}: {reason}")


def _range(ends: Sequence[float | None] | None, form: str) -> str:
    known = [end for end in ends or () if end is not None]
    return f"{known[0]:{form}} to {known[1]:{form}}" if len(known) == 2 else "unknown"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
