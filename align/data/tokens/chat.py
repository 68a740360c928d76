"""Text -> token ids: the one file that decides which tokens are trained, scored and sampled.

A prompt has the tokens that sampling gives it, and an answer those that it has after that prompt in
the whole text; no token crosses the boundary. A response that is decoded and encoded again gives
the same tokens (for canonical tokenisations), so a reward model scores what training saw. No row is
ever shortened: what is too long is a bad row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from align.data.tokens.answers import (
    Prompts,
    cut_text,
    encode_after,
    encode_turns,
    group_of,
    split_group,
)
from align.data.tokens.decode import without_bos
from align.data.tokens.template import (
    OURS,
    cut_at_end,
    end_token_ids,
    render,
    require_keys_rendered,
    require_rendered,
)
from align.data.tokens.text_ids import Tokenizer, encode_text, eos_id
from align.types import (
    AlignError,
    Message,
    PreferencePair,
    PromptExample,
    SFTExample,
    Text,
    TokenGroup,
    TokenSequence,
)

__all__ = [
    "encode_answers",
    "encode_completion",
    "encode_example",
    "encode_examples",
    "encode_pair",
    "encode_prompt",
    "encode_sft",
    "end_token_ids",
    "over_length",
]

Example: TypeAlias = SFTExample | PreferencePair | PromptExample
LossOn: TypeAlias = Literal["auto", "completion", "all"]

_NOTHING = np.zeros(0, dtype=np.int32)
_SKIP = "or set data.on_bad_row=skip"


def encode_prompt(tokenizer: Tokenizer, prompt: Text) -> np.ndarray:
    """Token ids, int32, of what the model is asked to continue.

    A string gets the tokenizer's own BOS, once even if the text spells it out, and no EOS. Turns
    are rendered by the chat template up to the start of the assistant's turn; the template decides
    about BOS.
    """
    if not isinstance(prompt, str):
        text = render(tokenizer, prompt, open_turn=True)
        require_rendered(tokenizer, prompt, text)
        require_keys_rendered(tokenizer, prompt)
        return _array(encode_text(tokenizer, text))
    ids = _encode_from_start(tokenizer, prompt)
    if ids[-1:] == [tokenizer.eos_token_id]:
        plain = encode_text(tokenizer, prompt)
        if plain and ids[-1 - len(plain) : -1] == plain:
            ids.pop()  # the tokenizer closes every text with EOS, but this one goes on
    return _array(ids)


def encode_completion(
    tokenizer: Tokenizer, prompt: Text, completion: Text, *, finished: bool = True
) -> np.ndarray:
    """Token ids, int32, of an answer to ``prompt``, through its end token where it is finished.

    They are the tokens that the answer has in the whole, as `encode_after` says. A string answer to
    a prompt of turns is one assistant turn. What a template writes after the end token
    (``<|im_end|>\\n``) is left out: training, scoring and sampling all stop at it. Where there is
    no end token, EOS is appended.

    Args:
        tokenizer: A ``transformers`` tokenizer with an EOS token.
        prompt: What is answered.
        completion: A string, or turns.
        finished: False for a response that hit the length limit: no end token then.
    """
    (answer,) = encode_answers(tokenizer, prompt, [completion]).continuations
    ids = answer.input_ids
    ended = bool(len(ids)) and int(ids[-1]) in end_token_ids(tokenizer)
    return ids[:-1] if ended and not finished else ids


def encode_answers(
    tokenizer: Tokenizer,
    prompt: Text,
    answers: Sequence[Text],
    *,
    id: str = "",
    margin: float | None = None,
) -> TokenGroup:
    """A prompt once, continued by each answer, of which what the model says counts.

    The tokens that score and train an answer. A prompt of turns may end earlier for one answer than
    for another (see `answers.py`): what they share is the group's prefix.
    """
    if isinstance(prompt, str):
        ids = encode_prompt(tokenizer, prompt)
        sequences = [_string_answer(tokenizer, prompt, ids, answer) for answer in answers]
        return TokenGroup(ids, tuple(sequences), id=id, margin=margin)
    prompts = Prompts(tokenizer)
    found = [_one_sequence(prompts, prompt, answer) for answer in answers]
    return group_of(found, id=id, margin=margin)


def _string_answer(
    tokenizer: Tokenizer, prompt: str, prompt_ids: np.ndarray, answer: Text
) -> TokenSequence:
    if not isinstance(answer, str):
        raise AlignError(
            "the answer is a list of turns although the prompt is a string; "
            "give both as strings or both as turns"
        )
    end, own = eos_id(tokenizer), without_bos(tokenizer, prompt, prompt_ids.tolist())
    said, ended = cut_at_end(tokenizer, answer, is_turn=False)
    ids, _ = encode_after(tokenizer, prompt, own, said)
    ids = ids if ended else [*ids, end]
    return TokenSequence(_array(ids), np.ones(len(ids), dtype=bool))


def _one_sequence(prompts: Prompts, prompt: Sequence[Message], answer: Text) -> TokenSequence:
    turns = (*prompt, *_turns(answer))
    found = encode_turns(prompts.tokenizer, turns, first=len(prompt), prompts=prompts)
    if len(found) > 1:
        raise AlignError(
            "the answer has several assistant turns, and the chat template writes the earlier ones "
            "otherwise once the conversation goes on, so that they are not one sequence; put all "
            "but the last into the prompt"
        )
    return found[0]


def encode_sft(
    tokenizer: Tokenizer, example: SFTExample, *, loss_on: LossOn = "auto"
) -> TokenGroup:
    """One continuation without a prefix, with a mask of the tokens to learn from.

    ``auto`` learns from completions in dialogue and in prompt + completion, from everything in
    plain text. In a dialogue every assistant turn counts, its end token included, nothing else.
    """
    if example.text is not None:
        if loss_on == "completion":
            raise AlignError(
                "plain text has no completion; set data.loss_on=all, or give prompt + completion "
                "or messages"
            )
        read, end = _encode_from_start(tokenizer, example.text), eos_id(tokenizer)
        text = _array(read if read[-1:] == [end] else [*read, end])
        whole = TokenSequence(text, np.ones(len(text), dtype=bool))
        return TokenGroup(_NOTHING, (whole,), id=example.id)
    prompt, completion = example.prompt or "", example.completion or ""
    if example.messages is None and isinstance(prompt, str):
        group = encode_answers(tokenizer, prompt, [completion])
        ids = np.concatenate([group.prefix_ids, group.continuations[0].input_ids])
        counts = (np.arange(len(ids)) >= len(group.prefix_ids)) | (loss_on == "all")
        return TokenGroup(_NOTHING, (TokenSequence(ids, counts),), id=example.id)
    if example.messages is not None:
        turns, first = example.messages, 0
    else:
        turns, first = (*prompt, *_turns(completion)), len(prompt)
    if loss_on == "all":
        return TokenGroup(_NOTHING, (_all_of(tokenizer, turns, first),), id=example.id)
    sequences = encode_turns(tokenizer, turns, first=first)
    if len(sequences) == 1:
        return TokenGroup(_NOTHING, tuple(sequences), id=example.id)
    return group_of(sequences, id=example.id)


def _all_of(tokenizer: Tokenizer, turns: Sequence[Message], first: int) -> TokenSequence:
    """A conversation as it is rendered up to its last assistant turn, every token counted."""
    if any(not turn.get(OURS, True) for turn in turns):
        raise AlignError(
            "data.loss_on=all trains every token, but a turn says that it is not trained; set "
            "data.loss_on=auto, or take the key out of the rows"
        )
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=first)
    (whole,) = encode_turns(tokenizer, turns, first=last)
    return TokenSequence(whole.input_ids, np.ones(len(whole.input_ids), dtype=bool))


def encode_pair(tokenizer: Tokenizer, pair: PreferencePair) -> TokenGroup:
    """The prompt once, continued by chosen and by rejected."""
    group = encode_answers(
        tokenizer, pair.prompt, [pair.chosen, pair.rejected], id=pair.id, margin=pair.margin
    )
    chosen, rejected = group.continuations
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        raise AlignError("chosen and rejected are the same tokens; remove the row")
    return group


def encode_examples(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    on_bad_row: Literal["stop", "skip"] = "stop",
    loss_on: LossOn = "auto",
) -> tuple[list[TokenGroup], list[int], dict[str, int]]:
    """Tokenise examples of any kind; a prompt becomes a group without continuations.

    Plain text over ``max_tokens`` is cut into consecutive pieces that lose no token and no
    prediction. Anything else that is longer, prompt and longest answer together, is a bad row.

    Returns:
        The groups in order; for each the number of its example; and bad rows counted by reason.
    """
    found = encode_some(
        tokenizer, examples, max_tokens=max_tokens, on_bad_row=on_bad_row, loss_on=loss_on
    )
    require_usable(len(examples), len(found.groups), found.first_dropped)
    return found.groups, found.owners, found.dropped


@dataclass(frozen=True)
class Encoded:
    """Groups of some examples; ``first_dropped`` tells the first bad row in full, if any."""

    groups: list[TokenGroup]
    owners: list[int]
    dropped: dict[str, int]
    first_dropped: str


def require_usable(num_examples: int, num_groups: int, first_dropped: str) -> None:
    """Refuse a data set of bad rows only."""
    if num_examples and not num_groups:
        raise AlignError(f"no usable row among {num_examples}; the first: {first_dropped}")


def encode_some(
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    *,
    max_tokens: int,
    on_bad_row: Literal["stop", "skip"],
    loss_on: LossOn,
) -> Encoded:
    """`encode_examples` of a part of the examples, where one without a usable row is no error."""
    groups: list[TokenGroup] = []
    owners: list[int] = []
    dropped: Counter[str] = Counter()
    first = ""
    for number, example in enumerate(examples):
        try:
            group = encode_example(tokenizer, example, loss_on)
            if isinstance(example, SFTExample) and example.text is not None:
                pieces = cut_text(group, max_tokens)
                groups += pieces
                owners += [number] * len(pieces)
                continue
            problem = over_length(group, max_tokens)
            if not problem and isinstance(example, SFTExample):
                parts = split_group(group, max_tokens)
                groups += parts
                owners += [number] * len(parts)
                continue
        except AlignError as error:
            problem, reason = str(error), str(error).partition(";")[0].partition("(")[0].strip()
        else:
            reason = "longer than data.max_tokens"
        if not problem:
            groups.append(group)
            owners.append(number)
            continue
        first = first or f"{example.id}: {problem}"
        dropped[reason] += 1
        if on_bad_row == "stop":
            raise AlignError(f"{first}; {_SKIP}")
    return Encoded(groups, owners, dict(dropped), first)


def encode_example(tokenizer: Tokenizer, example: Example, loss_on: LossOn = "auto") -> TokenGroup:
    if isinstance(example, SFTExample):
        return encode_sft(tokenizer, example, loss_on=loss_on)
    if isinstance(example, PreferencePair):
        return encode_pair(tokenizer, example)
    return TokenGroup(encode_prompt(tokenizer, example.prompt), (), id=example.id)


def over_length(group: TokenGroup, max_tokens: int) -> str:
    """Say why the group does not fit; an empty string if it fits."""
    len_prompt = len(group.prefix_ids)
    len_answer = max((len(c.input_ids) for c in group.continuations), default=0)
    if len_prompt + len_answer <= max_tokens:
        return ""
    if len_prompt == 0:
        what = f"has {len_answer} tokens"
    elif not group.continuations:
        what = f"prompt has {len_prompt} tokens"
    else:
        what = f"prompt has {len_prompt} tokens and its longest answer {len_answer}"
    return f"{what}, more than data.max_tokens={max_tokens}; shorten it, raise data.max_tokens"


def _turns(completion: Text) -> tuple[Message, ...]:
    if isinstance(completion, str):
        return ({"role": "assistant", "content": completion},)
    return completion


def _encode_from_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """With the tokenizer's special tokens, but a BOS that the text spells out is not doubled."""
    ids = encode_text(tokenizer, text, specials=True)
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
