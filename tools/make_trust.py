"""docs/trust.md from docs/trust/*.json: what was measured, against what was wanted.

    python tools/make_trust.py

The files are written by the tests themselves (tools/trust.py) when ALIGN_TRUST is set, as
`make oracles` does. No figure on the page is typed.
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"

# table -> its heading and what has to be said of it; in the page's order
TABLES: dict[str, tuple[str, str]] = {
    "oracles": (
        "Oracles",
        "The shipped stages, run on a toy language whose optimum is known in closed form: "
        "pi* = pi_ref exp(r / beta) / Z. Plots of the way there: [oracles](oracles/).",
    ),
    "equivalences": ("Equivalences", "Two ways to compute one thing, and how far they differ."),
    "resume": ("Exact resume", "A run killed there and resumed, against the uninterrupted one."),
    "faults": ("Faults", "What was done to a run, and what came of it."),
    "fuzz": ("Fuzzing", "Inputs tried on each reader; none may give a traceback or a wrong row."),
    "doctor": ("Run doctor", "Runs made to be bad, and what the doctor said of them."),
    "seeds": ("Seeds", "PPO from several seeds, against the model that it started from."),
}

HEAD = """\
# What was checked

Made by `make oracles` (`tools/make_trust.py`) from figures that the tests measured and asserted.
The last column says which test; running it again measures again.
"""


def render(folder: Path = DOCS / "trust") -> str:
    unknown = sorted(p.stem for p in folder.glob("*.json") if p.stem not in TABLES)
    if unknown:
        raise SystemExit(f"tools/make_trust.py: {', '.join(unknown)}: add its heading to TABLES")
    parts = [HEAD]
    for name, (heading, says) in TABLES.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))
        parts += [
            f"## {heading}\n\n{says}\n",
            "| what | found | wanted | test |",
            "|---|---|---|---|",
        ]
        parts += [
            f"| {_cell(what)} | {_cell(r['found'])} | {_cell(r['wanted'])} | `{r['test']}` |"
            for what, r in rows.items()
        ]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    (DOCS / "trust.md").write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
