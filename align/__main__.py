"""``python -m align``, which is what ``accelerate launch -m align`` runs in every process."""

from __future__ import annotations

import sys

from align.cli import main

if __name__ == "__main__":
    sys.exit(main())
