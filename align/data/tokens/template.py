"""Rendering of turns by a tokenizer's chat template, and the tokens that end a turn.

A template has to write every turn's words. One that leaves some out is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from align.data.formats.turn_keys import TOOLS
from align.data.formats.turns import ALLOWED, ROLES
from align.data.tokens.sandbox import Unbounded, Untried, render_bounded
from align.data.tokens.text_ids import Tokenizer, encode_text, special_tokens
from align.types import AlignError, Message

PROBE = "alignprobe"  # letters only, so that no template or tokenizer alters it

OURS = "train"
"""Our own key of a turn, which no template gets: False is not trained."""
LINKS = ("tool_call_id", "name")
"""Keys that only say which call a tool's turn answers: the order of turns says it too."""
RECORDS = frozenset({
    "id", "message_id", "parent_id", "turn_id", "turn_identifier", "index", "timestamp", "time",
    "date", "created_at", "created", "language", "lang", "model", "tokens", "num_tokens",
    "finish_reason", "redacted", "toxic", "hashed_ip", "country", "state", "header",
    "annotations", "metadata",
})  # fmt: skip
"""Keys of published data sets that are about a turn and no part of what was said."""

_EMPTY: tuple[Any, ...] = ("", [], {})


# ---------------------------------------------------------------- rendering


def render(tokenizer: Tokenizer, turns: Sequence[Message], *, open_turn: bool = False) -> str:
    """The turns as the template writes them; ``open_turn`` begins the assistant's next one.

    Tools of the first turn are given to the template beside the turns.
    """
    if not tokenizer.chat_template:
        raise AlignError(
            "the tokenizer has no chat template but the data are turns; put chat_template.jinja "
            "beside the tokenizer, or give prompts and answers as strings"
        )
    template = str(tokenizer.chat_template)
    for role in {t["role"] for t in turns} - set(ROLES):
        if not _names(template, role):
            raise AlignError(
                f"the chat template does not know the role {role!r}; allowed: {ALLOWED}"
            )

    def apply(turns: Sequence[Mapping[str, Any]], open_turn: bool) -> str:
        first = {key: value for key, value in turns[0].items() if key != TOOLS}
        found = tokenizer.apply_chat_template(
            [first, *turns[1:]],
            tools=turns[0].get(TOOLS),
            tokenize=False,
            add_generation_prompt=open_turn,
        )
        return str(found)

    given = [{k: v for k, v in turn.items() if k != OURS} for turn in turns]
    try:
        return render_bounded(template, apply, given, open_turn)
    except Unbounded as error:
        raise AlignError(
            f"the chat template is refused: {error}; look at chat_template.jinja beside the "
            "tokenizer, and write or take another"
        ) from error
    except Untried as error:
        raise AlignError(
            f"the chat template could not be tried, so it is not used: {error}; templates are "
            "tried and watched in processes of their own: free memory, or raise the limits of "
            "this process (ulimit -a)"
        ) from error
    except Exception as error:  # a template may raise anything
        roles = ", ".join(t["role"] for t in turns) or "none"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AlignError(
            f"the chat template refuses turns in this order ({roles}): {reason}; "
            "change the rows or the template"
        ) from error


@lru_cache(maxsize=256)
def _names(template: str, role: str) -> bool:
    """Tell whether a template names a role. Many write any role, which then would be trained.

    It is looked for in quotes, which every comparison with it has.
    """
    return bool(re.search(rf"""['"]{re.escape(role)}['"]""", template))


# ---------------------------------------------------------------- what has to be rendered


def holds(text: str, content: str) -> bool:
    """Tell whether a rendered text has the words of a turn, whatever their white space there."""
    return content.strip() in text or _squeezed(content) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def require_rendered(
    tokenizer: Tokenizer, turns: Sequence[Message], text: str, *, first: int = 0
) -> None:
    """Refuse a template that leaves words of these turns out of their rendered ``text``.

    An assistant's earlier turn has to end there: templates drop the thinking before it. Turns
    before ``first`` are known to be there.
    """
    for i in range(first, len(turns)):
        turn = turns[i]
        said = turn["content"].strip()
        if turn["role"] == "assistant":
            said = said[-32:].strip()
        as_json = json.dumps(said, ensure_ascii=False)[1:-1]  # as templates write a tool's words
        if said in text or as_json in text or _squeezed(said) in _squeezed(text):
            continue
        probed = [*turns[:i], {**turn, "content": f"{turn['content']} {PROBE}"}, *turns[i + 1 :]]
        if PROBE not in render(tokenizer, probed, open_turn=True):
            raise left_out(turn["role"])


def left_out(role: str) -> AlignError:
    return AlignError(
        f"the chat template leaves out turns of role {role!r}; change the rows or the template"
    )


def require_keys_rendered(tokenizer: Tokenizer, turns: Sequence[Message]) -> None:
    """Refuse a turn with a key (thinking, tool calls, a name) that its rendering does not show.

    Empty values say nothing, and neither do `RECORDS` and, of a tool's turn, `LINKS`.
    """
    for i, turn in enumerate(turns):
        if len(turn) == 2:
            continue
        before = turns[i - 1]["role"] if i else ""
        for key in _keys_of(turn):
            # a template writes a key by its name and by where the turn stands, so one rendering
            # shows it for all rows: two renderings for every key of every row would be quadratic
            empty = not turn["content"].strip()
            kind = (before, turn["role"], empty, key, type(turn[key]).__name__)
            shown = _shown_keys(str(tokenizer.chat_template))
            if kind in shown:
                continue
            without = {k: v for k, v in turn.items() if k != key}
            if not _changes(tokenizer, turns[:i], turn, without, turns[i + 1 :]):
                raise _key_left_out(key, turn["role"], is_first=not i)
            shown.add(kind)


def _key_left_out(key: str, role: str, *, is_first: bool) -> AlignError:
    if key == TOOLS and is_first:
        return AlignError(
            "the chat template writes no tools, but the rows have some; write them into the system "
            "turn, remove the column tools, or use a template that writes them"
        )
    return AlignError(
        f"the chat template leaves out {key!r} of a turn of role {role!r}; "
        "remove the key from the rows, or use a template that writes it"
    )


@lru_cache(maxsize=16)
def _shown_keys(template: str) -> set[tuple[str, str, bool, str, str]]:
    """Kinds of keys that a template has been seen to write; the set grows as rows are checked."""
    return set()


def _keys_of(turn: Message) -> Iterator[str]:
    links = () if turn["role"] in ("user", "system", "assistant") else LINKS
    for key, value in turn.items():
        if key in ("role", "content", OURS) or key in RECORDS or key in links:
            continue
        if value is not None and value is not False and value not in _EMPTY:
            yield key


def _changes(
    tokenizer: Tokenizer,
    before: Sequence[Message],
    turn: Message,
    without: Message,
    rest: Sequence[Message],
) -> bool:
    """Tell whether the rendering of a conversation up to a turn differs without one of its keys."""
    changes = True  # if both are refused, so is the row itself, with the template's reason
    # some templates refuse a conversation that ends in this turn, or write tools further on
    for following in ((), rest):
        try:
            shown = render(tokenizer, (*before, turn, *following))
        except AlignError:
            continue
        try:
            changes = shown != render(tokenizer, (*before, without, *following))
        except AlignError:
            return True  # the template cannot do without it
        if changes:
            return True
    return changes


# ---------------------------------------------------------------- where a turn ends


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


def cut_at_end(tokenizer: Tokenizer, said: str, *, is_turn: bool = True) -> tuple[str, bool]:
    """A text up to the first end token after its words, and whether it has one.

    After the words is where only white space and special tokens follow, or what the template writes
    after every turn. Words that spell out the end token themselves so end in one, not in two.
    ``is_turn`` says that the template rendered the text.
    """
    specials = special_tokens(tokenizer)
    texts = tuple(specials.values())
    words = said.rstrip()
    while words.endswith(texts):
        last = max((t for t in texts if words.endswith(t)), key=len)
        words = words[: -len(last)].rstrip()
    start, closing = len(words), _closing(tokenizer, str(tokenizer.chat_template))
    if is_turn and closing and said.endswith(closing):
        start = min(start, len(said) - len(closing))
    ends = [specials[i] for i in end_token_ids(tokenizer) if i in specials]
    # a template may end a turn of another kind (a tool call) with a token of its own
    for candidates in (ends, texts) if is_turn else (ends,):
        found = [(at, -len(t)) for t in candidates if (at := said.find(t, start)) >= 0]
        if found:
            at, size = min(found)
            return said[: at - size], True
    return said, False


@lru_cache(maxsize=16)
def _closing(tokenizer: Tokenizer, template: str) -> str:
    """Text that the template writes after the words of a conversation's last assistant turn.

    ``template`` is only a part of the cache's key: a tokenizer may be given another one later.
    """
    if not tokenizer.chat_template:
        return ""
    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": PROBE})
    try:
        return render(tokenizer, turns).rpartition(PROBE)[2]
    except AlignError:  # rows that need the template say so themselves, with their place
        return ""


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer, template: str) -> int | None:
    """The first special token that the template writes after an assistant's words."""
    special = special_tokens(tokenizer)
    closing = encode_text(tokenizer, _closing(tokenizer, template))
    return next((i for i in closing if i in special), None)


@lru_cache(maxsize=16)
def opening(tokenizer: Tokenizer, template: str) -> str:
    """Text that opens the assistant's turn, such as ``<|im_start|>assistant``."""
    turns = ({"role": "user", "content": PROBE},)
    asked, opened = render(tokenizer, turns), render(tokenizer, turns, open_turn=True)
    same = next((k for k, (a, b) in enumerate(zip(asked, opened, strict=False)) if a != b), None)
    return opened[min(len(asked), len(opened)) if same is None else same :]


@lru_cache(maxsize=16)
def _dialogue_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Tokens of a conversation with nothing in its turns that is special; none without template."""
    if not tokenizer.chat_template:
        return ()
    user, assistant = ({"role": r, "content": PROBE} for r in ("user", "assistant"))
    try:
        return tuple(encode_text(tokenizer, render(tokenizer, (user, assistant, user))))
    except AlignError:  # rows that need the template say so
        return ()


def times_in_dialogue(tokenizer: Tokenizer, token: int) -> int:
    """Count how often the chat template writes a token in a conversation of three turns."""
    return _dialogue_ids(tokenizer, str(tokenizer.chat_template)).count(token)


def structure_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Special tokens that the chat template writes around turns, and BOS, pad and the ends."""
    written = _dialogue_ids(tokenizer, str(tokenizer.chat_template))
    named = tokenizer.bos_token_id, tokenizer.pad_token_id, *end_token_ids(tokenizer)
    special = special_tokens(tokenizer)
    return frozenset(i for i in (*written, *named) if i is not None and i in special)
