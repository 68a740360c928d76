"""Text -> token ids as a tokenizer has them, without a chat template."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

from align.types import AlignError

Tokenizer: TypeAlias = Any
"""A ``transformers`` tokenizer; its own type does not say what it takes and gives."""


def encode_text(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """Token ids of the text; ``specials`` are BOS and EOS where the tokenizer adds them."""
    kind: Any = type(tokenizer)
    if _is_plain(kind):
        backend = tokenizer.backend_tokenizer
        cuts_or_pads = backend.truncation is not None or backend.padding is not None
        if not cuts_or_pads and backend.encode_special_tokens == tokenizer.split_special_tokens:
            # what the call below comes to, in a third of its time for a short text
            return list(backend.encode(text, add_special_tokens=specials).ids)
    found = tokenizer(
        text,
        add_special_tokens=specials,
        return_attention_mask=False,  # lists that nobody reads are an eighth of the time
        return_token_type_ids=False,
    )
    return list(found["input_ids"])


@lru_cache(maxsize=64)
def _is_plain(kind: Any) -> bool:
    """Tell whether calling such a tokenizer with a text is nothing but a call of its Rust backend.

    That is so where both steps of a call are those of ``transformers`` itself, and no language is
    put around the text (mBART).
    """
    steps = ("__call__", "_encode_plus")
    where = [getattr(getattr(kind, step, None), "__module__", "") for step in steps]
    if hasattr(kind, "_switch_to_input_mode"):
        return False
    return where == [f"transformers.tokenization_utils_{part}" for part in ("base", "tokenizers")]


def eos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise AlignError(
            "the tokenizer has no EOS token, so no answer could ever end; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> text of the special tokens. Added words that are not special (``<tool_call>``) are
    text."""
    found = {int(i): str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = [tokenizer.eos_token_id, *tokenizer.all_special_ids]
    found.update({i: tokenizer.convert_ids_to_tokens(i) for i in named if i is not None})
    return {i: text for i, text in found.items() if text}
