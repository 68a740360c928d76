"""Content-Security-Policy of align's pages: their own script, and no network."""

from __future__ import annotations

import base64
import hashlib
import re

NOTHING = "'none'"


def content_security_policy(page: str, *, connect: str = NOTHING) -> str:
    """Allow the page's own inline scripts, and nothing injected into it.

    Scripts are allowed by their hash. Styles are allowed inline (drawings have them in attributes):
    without a network they can change the display, but leak nothing.

    Args:
        page: HTML as it is sent; its ``<script>`` elements have no attributes.
        connect: Source that scripts may fetch from, such as ``'self'``.
    """
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return (
        f"default-src 'none'; script-src {' '.join(allowed or [NOTHING])}; "
        "style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
