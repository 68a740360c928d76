"""Records that cross packages, and nothing else: no reading, no maths, no models.

Every mask in this package means **True = counts**.  Token ids are int64 in tensors and int32 on the
host, log-probabilities are float32 nats, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # a misspelt recipe key is answered without waiting for torch
    import numpy as np
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: ``role`` and ``content``, both strings, and optional other keys.

Other keys (``name``, ``tool_calls``, ``reasoning_content``, ...) reach the chat template unchanged.
``train`` is ours: False = not trained on, absent = trained; templates never get it. Nor do they get
``tools`` in the first turn, which they are passed beside the turns.
"""

Text: TypeAlias = str | tuple[Message, ...]
"""A plain string, or the turns of a conversation."""


class AlignError(ValueError):
    """An error that the user can fix; the command line prints its one line and exits with 2."""


class NonFiniteError(AlignError):
    """A NaN or infinity: ``what`` was found in these ``rows`` of a batch.

    ``cure`` is the remedy; ``responses`` are the rows' texts if those are at fault.
    """

    def __init__(
        self, line: str, *, what: str, value: float, rows: Sequence[int], cure: str,
        responses: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(line)
        self.what, self.value, self.rows = what, value, tuple(rows)
        self.cure, self.responses = cure, tuple(responses)

    def having(self, **changed: Any) -> NonFiniteError:
        """Copy the error with other fields, such as the batch's row numbers or the responses."""
        return _non_finite(str(self), {**vars(self), **changed})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, since processes exchange it."""
        return _non_finite, (str(self), vars(self))


def _non_finite(line: str, found: dict[str, Any]) -> NonFiniteError:
    return NonFiniteError(line, **found)


class Interrupted(KeyboardInterrupt):
    """A run stopped by signal ``number``; its line says how to resume."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number = number


@dataclass(frozen=True, kw_only=True)
class SFTExample:
    """A text to imitate: a conversation, a prompt with its completion, or plain text.

    Exactly one of ``messages``, ``prompt`` + ``completion`` and ``text`` is set.
    ``id`` is ``file:line`` (or ``dataset/split:row``), so that every row can be found again.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    prompt: Text | None = None
    completion: Text | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, the better one first; all three are strings, or all are turns.

    ``margin`` is the difference in reward units, if the data has one.
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptExample:
    """A prompt to answer, with reference answers if there are any.

    ``source_text`` is the text that the task rewrites (for the copy-the-input baseline), if any.
    ``extra`` holds the row's columns that nothing reads, as JSON values.
    """

    id: str
    prompt: Text
    references: tuple[str, ...] = ()
    source_text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """Counts of one file's rows: ``rows_read == rows_kept + sum(dropped.values())``.

    ``unread`` are columns that the format does not read; ``noted`` counts odd rows that are used.
    """

    path: str
    sha256: str | None
    rows_read: int
    rows_kept: int
    dropped: Mapping[str, int]
    first_dropped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    noted: Mapping[str, int] = field(default_factory=dict)
    first_noted: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence, and a mask of those that count.

    Attributes:
        input_ids: int32 ``[n]``, n >= 1.
        loss_mask: bool ``[n]``, True = counts.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its continuations: the unit that packing never splits.

    SFT has an empty prefix and one continuation, a preference pair has the prompt, chosen and
    rejected (in this order), a PPO prompt has k responses. ``index`` is its number in its data set.
    """

    prefix_ids: np.ndarray
    continuations: tuple[TokenSequence, ...]
    id: str = ""
    margin: float | None = None
    index: int = -1

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + sum(len(c.input_ids) for c in self.continuations)

    @property
    def num_counted(self) -> int:
        """Tokens with a loss; the first token of a sequence without a prefix is not predicted."""
        unpredicted = 0 if len(self.prefix_ids) else 1
        return int(sum(c.loss_mask[unpredicted:].sum() for c in self.continuations))


@dataclass(frozen=True)
class Segment:
    """Columns ``start:stop`` of ``row``; it continues ``prefix_start:prefix_stop`` of that row.

    It continues a whole segment, which comes before it and may continue another. ``sequence``
    numbers the continuations in the caller's order, -1 for a shared prefix. The first ``offset``
    tokens of a continuation are in an opening that it shares.
    """

    row: int
    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0
    sequence: int = -1
    offset: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows: several sequences in a row, prompts shared, little padding.

    A token attends to earlier tokens of its own segment, to the whole segment that it continues,
    and so on up. An opening common to all groups of a batch (a system prompt, an instruction) is in
    it once. The first token of a response is predicted by the last token of its prefix:
    ``predictor`` says so for every token, and one gather serves every loss.

    Attributes:
        input_ids: ``[B,T]`` token ids.
        position_ids: ``[B,T]`` position inside the token's own sequence, its prefix included.
        segment_ids: ``[B,T]`` 0 = padding, 1.. = a segment, numbered over the whole batch.
        predictor: ``[B,T]`` column whose hidden state predicts this token (the token's own column
            if there is none: such a token never counts).
        loss_mask: ``[B,T]`` True = counts.
        segments: The same bounds as host integers, in the order of ``segment_ids`` (segment s is
            ``segments[s - 1]``), so that no backend has to read them back from a device.
    """

    input_ids: Int[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]
    segment_ids: Int[Tensor, "batch time"]
    predictor: Int[Tensor, "batch time"]
    loss_mask: Bool[Tensor, "batch time"]
    segments: tuple[Segment, ...]

    def to(self, device: torch.device | str) -> TokenBatch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "segments"
        }
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """Tokens computed: without padding, shared ones once."""
        return sum(s.stop - s.start for s in self.segments)

    @property
    def sequences(self) -> tuple[Segment, ...]:
        """The segments that are continuations, in the batch's order."""
        return tuple(s for s in self.segments if s.sequence >= 0)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, right-padded to the longest.

    Attributes:
        prompt_ids: One int32 array for each row; rows of one prompt are neighbours.
        input_ids: ``[B,R]`` sampled tokens, EOS included if the response has one.
        response_mask: ``[B,R]`` True on sampled tokens up to and including EOS.
        logprobs: ``[B,R]`` log-probabilities of the sampled tokens at the sampling temperature.
        finished: ``[B]`` True if the response ended with EOS rather than at the length limit.
        engine_logprobs: ``[B,R]`` log-probabilities of the same tokens by the engine that drew
            them; None if that was the policy itself, or with another distribution (``top_p``
            below 1).
    """

    prompt_ids: tuple[np.ndarray, ...]
    input_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    finished: Bool[Tensor, " batch"]
    engine_logprobs: Float[Tensor, "batch response"] | None = None


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that an update needs; ``[B,R]`` tensors are 0 outside the mask."""

    rollout: Rollout
    ref_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    rewards: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    scores: Float[Tensor, " batch"]


Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Column of a data set -> its value for each response."""


class RewardSource(Protocol):
    """A source of one score for each response.

    ``columns`` are the rows' extra columns, which a user's function may ask for by name.
    """

    name: str

    def __call__(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str],
        references: Sequence[Sequence[str]],
        columns: Columns | None = None,
    ) -> Sequence[float]: ...


RewardFunction: TypeAlias = Callable[..., Sequence[float]]
