"""Measured figures on their way into docs/trust.md: a test that asserts one also hands it on.

    def test_something(trust):
        trust.at_most("oracles", "DPO, tabular: KL(pi || pi*), nats", measured, 1e-6)
        trust.row("faults", "kill -9 in a save", found="resumed, equal", wanted="equal weights")

A row is written only where ALIGN_TRUST is set (`make oracles`), into docs/trust/<table>.json, under
the name of what was measured: measuring again replaces it. tools/make_trust.py renders the page.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from align.base.locks import waiting_for

FOLDER = Path(__file__).parents[1] / "docs" / "trust"


class Trust:
    """Asserts what was measured, and keeps it when asked to."""

    def __init__(self, test: str, folder: Path = FOLDER, *, keep: bool | None = None) -> None:
        self.test, self.folder = test, folder
        self.keep = bool(os.environ.get("ALIGN_TRUST")) if keep is None else keep

    def at_most(self, table: str, what: str, measured: float, bound: float) -> None:
        """Fails where ``measured`` is above ``bound``, or is no number."""
        assert measured <= bound, f"{what}: {measured:.4g}, wanted at most {bound:.4g}"
        self.row(table, what, found=f"{measured:.2g}", wanted=f"at most {bound:g}")

    def row(self, table: str, what: str, *, found: str, wanted: str) -> None:
        """One line of a table; called after what it says was asserted."""
        if not self.keep:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{table}.json"
        with waiting_for(self.folder):  # tests run on several cores
            rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            rows[what] = {"found": found, "wanted": wanted, "test": self.test}
            text = json.dumps(dict(sorted(rows.items())), indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
