"""Token ids of a response -> its text, so that encoding it again gives the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.data.tokens.answers import encode_after
from align.data.tokens.template import end_token_ids
from align.data.tokens.text_ids import Tokenizer
from align.types import Text


def decode_response(
    tokenizer: Tokenizer,
    ids: Sequence[int] | np.ndarray,
    *,
    prompt: Text = (),
    prompt_ids: Sequence[int] | np.ndarray = (),
    end_ids: Sequence[int] = (),
) -> str:
    """Decode a sampled response: its final end token is removed, everything else kept.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        ids: The response's tokens.
        prompt: What is answered. Behind a string the space that a sentencepiece decoder drops from
            the first word is kept; what a template writes before a turn's words is no part of them.
        prompt_ids: Tokens of the prompt.
        end_ids: End tokens that the tokenizer does not know of, as a model may have.
    """
    tokens = [int(i) for i in ids]
    if tokens and tokens[-1] in (*end_token_ids(tokenizer), *end_ids):
        tokens.pop()
    text = _decode(tokenizer, tokens)
    if not tokens or not len(prompt_ids) or not isinstance(prompt, str):
        return text
    given = [int(i) for i in prompt_ids]
    head, alone = _decode(tokenizer, given[-1:]), _decode(tokenizer, tokens[:1])
    first = _decode(tokenizer, [given[-1], tokens[0]])
    lead = first.removeprefix(head).removesuffix(alone)
    if lead != " " or first != head + lead + alone:
        return text
    given = without_bos(tokenizer, prompt, given)
    again, _ = encode_after(tokenizer, prompt, given, text)
    return text if again == tokens else lead + text


def without_bos(tokenizer: Tokenizer, prompt: str, prompt_ids: Sequence[int]) -> list[int]:
    """The tokens of a string prompt without the BOS that the tokenizer has put before its text."""
    own = list(prompt_ids)
    added = own[:1] == [tokenizer.bos_token_id] and not prompt.startswith(tokenizer.bos_token)
    return own[1:] if added else own


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
