"""Faults of a text that any reader sees: broken encodings, invisible characters, markup.

It names oddities and repairs none. Languages are told apart by script only; within one script
(English and French) nothing is claimed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

ODDITIES: dict[str, re.Pattern[str]] = {
    "a replacement character (U+FFFD): text was decoded wrongly": re.compile("\ufffd"),
    "mojibake (such as Ã© for é): UTF-8 was read as Latin-1": re.compile(
        "[ÂÃ][\u0080-\u00bf]|â\u20ac[\u0080-\uffff]|â\u0080[\u0080-\u00bf]"
    ),
    "a control character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]"),
    "an invisible or direction-changing character": re.compile(
        "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    ),
    "a private-use character, which every font shows otherwise": re.compile("[\ue000-\uf8ff]"),
    "Windows line ends (\\r\\n)": re.compile("\r\n"),
    "a placeholder of an image, a video or a sound, of which nothing is read": re.compile(
        r"<(?:image|video|audio)>|<\|(?:image(?:_\d+|_pad)?|video_pad|audio)\|>"
    ),
    "HTML entities (such as &amp;)": re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});"),
}


def oddities(text: str) -> list[str]:
    """Names of what is odd in the text; keys of ``ODDITIES``, or that accents are written apart."""
    found = [name for name, pattern in ODDITIES.items() if pattern.search(text)]
    if not text.isascii() and unicodedata.normalize("NFC", text) != text:
        found.append("letters and accents written apart (not NFC)")
    return found


def script(text: str) -> str | None:
    """The script of most letters (LATIN, CYRILLIC, CJK, ...), None without ten letters."""
    letters = [c for c in text[:2000] if c.isalpha()]
    if len(letters) < 10:
        return None
    if text.isascii():
        return "LATIN"
    return Counter(_script_of(c) for c in letters).most_common(1)[0][0]


def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]
