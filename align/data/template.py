"""What a tokenizer and its chat template do to text: rendering turns, and where a turn ends.

Works with any template that never changes what it already wrote; others are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from align.data.turns import ALLOWED, ROLES
from align.types import AlignError, Message

Tokenizer: TypeAlias = Any
"""A ``transformers`` tokenizer; its own type does not say what it takes and gives."""

_PROBE = "alignprobe"  # letters only, so that no template or tokenizer alters it


def encode_text(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """Token ids of the text; ``specials`` are BOS and EOS where the tokenizer adds them."""
    found = tokenizer(
        text,
        add_special_tokens=specials,
        return_attention_mask=False,  # lists that nobody reads are an eighth of the time
        return_token_type_ids=False,
    )
    return list(found["input_ids"])


def eos_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise AlignError(
            "the tokenizer has no EOS token, so no answer could ever end; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def end_token_ids(
    tokenizer: Tokenizer, generation_config_eos: int | Iterable[int] | None = None
) -> tuple[int, ...]:
    """Tokens at which a response ends: EOS, and what the chat template ends a turn with.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        generation_config_eos: ``model.generation_config.eos_token_id``, one or several, which
            some models use to name ends that their tokenizer does not know of.
    """
    more = generation_config_eos
    more = () if more is None else (more,) if isinstance(more, int) else tuple(more)
    ends = (tokenizer.eos_token_id, _turn_end(tokenizer, str(tokenizer.chat_template)), *more)
    return tuple(dict.fromkeys(int(i) for i in ends if i is not None))


def render(tokenizer: Tokenizer, turns: Sequence[Message], *, open_turn: bool = False) -> str:
    """The turns as the template writes them; ``open_turn`` begins the assistant's next one."""
    if not tokenizer.chat_template:
        raise AlignError(
            "the tokenizer has no chat template but the data are turns; put chat_template.jinja "
            "beside the tokenizer, or give prompts and answers as strings"
        )
    for role in {t["role"] for t in turns} - {"system", "user", "assistant"}:
        problem = _problem_with(tokenizer, str(tokenizer.chat_template), role)
        if problem:
            raise AlignError(problem)
    try:
        return tokenizer.apply_chat_template(
            [dict(t) for t in turns], tokenize=False, add_generation_prompt=open_turn
        )
    except Exception as error:  # a template may raise anything
        roles = ", ".join(t["role"] for t in turns) or "none"
        raise AlignError(
            f"the chat template refuses turns in this order ({roles}): {error}; "
            "change the rows or the template"
        ) from error


@lru_cache(maxsize=256)
def _problem_with(tokenizer: Tokenizer, template: str, role: str) -> str:
    """Why turns of this role cannot be rendered, or nothing.

    Many templates write any role that they are given, so that one nobody meant would be trained on;
    others leave out what they do not know.
    """
    named = re.search(rf"""['"]{re.escape(role)}['"]""", template)
    if role not in ROLES and not named:
        return f"role {role!r} is none that the chat template names; allowed: {ALLOWED}"
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    turn = {"role": role, "content": _PROBE}
    for turns in ([*asked, turn], [turn, *asked]):
        try:
            if _PROBE in tokenizer.apply_chat_template(turns, tokenize=False):
                return ""
        except Exception:  # a template may raise anything; what it says of the row comes later
            return ""
    return f"the chat template leaves out turns of role {role!r}; change the rows or the template"


def after(before: str, whole: str) -> str:
    """``whole`` without ``before``, which it must start with."""
    if not whole.startswith(before):
        raise AlignError(
            "the chat template renders a conversation differently once it goes on "
            f"({before[-40:]!r} does not stay as it was); use a template whose earlier text "
            "never changes, or give prompts and answers as strings"
        )
    return whole[len(before) :]


def close_turn(tokenizer: Tokenizer, turn: str) -> str:
    """A rendered assistant turn without what the template writes after its end token."""
    bare = turn.rstrip()
    ends = (tokenizer.decode([i]) for i in end_token_ids(tokenizer))
    return bare if any(bare.endswith(end) for end in ends) else turn


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer, template: str) -> int | None:
    """The first special token that the template writes after an assistant's words.

    ``template`` is only a part of the cache's key: a tokenizer may be given another one later.
    """
    if not tokenizer.chat_template:
        return None
    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE})
    try:
        suffix = render(tokenizer, turns).rpartition(_PROBE)[2]
    except AlignError:  # rows that need the template say so themselves, with their place
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in encode_text(tokenizer, suffix) if i in special), None)
