"""Shape annotations of ``align.losses`` are executed under pytest; at run time they are free."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook("align.losses", "beartype.beartype")
