"""Records that cross rooms, and nothing else: no reading, no maths, no models.

Every mask in this package means **True = counts**.  Token ids are int64 in tensors and int32 on the
host, log-probabilities are float32 nats, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:  # a misspelt recipe key is answered without waiting for torch
    import numpy as np
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: ``role`` and ``content``, both strings, and what else it has.

Other keys (``name``, ``tool_calls``, ``reasoning_content``, ...) go to the chat template as they
are. ``train`` is ours: False = not trained on, absent = trained; no template ever gets it. So is
``tools`` of the first turn, which templates are given beside the turns.
"""

Text: TypeAlias = str | tuple[Message, ...]
"""A plain string, or the turns of a conversation."""


class AlignError(ValueError):
    """Something the user can mend. The command line prints its one line and exits with 2."""


class NonFiniteError(AlignError):
    """A NaN or infinity: ``what`` was found in these ``rows`` of what was asked for.

    ``cure`` is what to do about it; ``responses`` are the rows' texts where they are at fault.
    """

    def __init__(
        self, line: str, *, what: str, value: float, rows: Sequence[int], cure: str,
        responses: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(line)
        self.what, self.value, self.rows = what, value, tuple(rows)
        self.cure, self.responses = cure, tuple(responses)

    def having(self, **changed: Any) -> NonFiniteError:
        """The same of other rows, as the whole numbers them, or with its responses."""
        return _non_finite(str(self), {**vars(self), **changed})

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes send it to one another."""
        return _non_finite, (str(self), vars(self))


def _non_finite(line: str, found: dict[str, Any]) -> NonFiniteError:
    return NonFiniteError(line, **found)


class Interrupted(KeyboardInterrupt):
    """A run that left because signal ``number`` told it to; its line says how to go on."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number = number


# ---------------------------------------------------------------- data as it is read


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One place that rows come from.

    Attributes:
        path: A local JSONL, JSON, Parquet, CSV or Arrow file (``.gz`` allowed for the text
            formats), a folder of such files, or a hub data set ``org/name``.
        name: The hub data set's configuration, if it has several.
        split: In the syntax of ``datasets.load_dataset``, of local files and folders too, such as
            ``test[:100]`` and ``train[10%:20%]``.
        weight: Relative weight when several sources are mixed: 2.0 repeats every row twice,
            0.5 keeps half of the rows; unit: copies of the source per epoch.
        columns: Our field -> the file's column, for files that name theirs otherwise.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SFTExample:
    """What to imitate: a conversation, a prompt with its completion, or plain text.

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
    """Two answers to one prompt, the better one first. All three are strings, or all are turns.

    ``margin`` is how much better, in the reward's unit, where the data say so.
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptExample:
    """A prompt to answer, with reference answers where there are any.

    ``source_text`` is what the task rewrites (for the copy-the-input baseline), if it has one.
    ``extra`` holds the row's columns that nothing reads, as JSON has them.
    """

    id: str
    prompt: Text
    references: tuple[str, ...] = ()
    source_text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of one file's rows: ``rows_read == rows_kept + sum(dropped.values())``.

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


# ---------------------------------------------------------------- tokens on the host


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence and which of them count.

    Attributes:
        input_ids: int32 ``[n]``, n >= 1.
        loss_mask: bool ``[n]``, True = counts.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class TokenGroup:
    """A prompt once, and what continues it: the unit that is never torn apart by packing.

    SFT has an empty prefix and one continuation, a preference pair has the prompt, chosen and
    rejected (in this order), a PPO prompt has k responses.
    """

    prefix_ids: np.ndarray
    continuations: tuple[TokenSequence, ...]
    id: str = ""
    margin: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + sum(len(c.input_ids) for c in self.continuations)

    @property
    def num_counted(self) -> int:
        """Tokens with a loss: nothing predicts the first token of a sequence without a prefix."""
        unpredicted = 0 if len(self.prefix_ids) else 1
        return int(sum(c.loss_mask[unpredicted:].sum() for c in self.continuations))


# ---------------------------------------------------------------- tokens on the device


@dataclass(frozen=True)
class Segment:
    """Columns ``start:stop`` of ``row``; it continues ``prefix_start:prefix_stop`` of that row.

    What is continued is a whole segment, which stands before this one and may continue another.

    ``sequence`` numbers the continuations in the order in which the caller gave them, -1 for a
    shared prefix. ``offset`` tokens of a continuation stand in front, in an opening that it shares.
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
    """Several sequences in a row, prompts shared, no padding where it can be avoided.

    A token attends to earlier tokens of its own segment, to the whole of the segment that it
    continues, and so on up. What all groups of a batch open with (a system prompt, an instruction)
    stands in it once. The first token of a response is predicted by the last token of its prefix:
    that is what ``predictor`` says, for every token, so one gather serves every loss.

    Attributes:
        input_ids: ``[B,T]`` token ids.
        position_ids: ``[B,T]`` position inside the token's own sequence, its prefix included.
        segment_ids: ``[B,T]`` 0 = padding, 1.. = a segment, numbered over the whole batch.
        prefix_ids: ``[B,T]`` the segment that this token's segment continues, 0 = none.
        predictor: ``[B,T]`` column whose hidden state predicts this token (the token's own column
            where there is none: such a token never counts).
        loss_mask: ``[B,T]`` True = counts.
        segments: The same bounds as host integers, in the order of ``segment_ids`` (segment s is
            ``segments[s - 1]``), so that no backend has to read them back from a device.
    """

    input_ids: Int[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]
    segment_ids: Int[Tensor, "batch time"]
    prefix_ids: Int[Tensor, "batch time"]
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
        """Tokens computed: padding left out, shared ones once."""
        return sum(s.stop - s.start for s in self.segments)

    @property
    def sequences(self) -> tuple[Segment, ...]:
        """The segments that are continuations, in the batch's order."""
        return tuple(s for s in self.segments if s.sequence >= 0)


# ---------------------------------------------------------------- what PPO hands on


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, right-padded to the longest of them.

    Attributes:
        prompt_ids: One int32 array for each row; rows of one prompt are neighbours.
        input_ids: ``[B,R]`` sampled tokens, EOS included where the response has one.
        response_mask: ``[B,R]`` True on sampled tokens up to and including EOS.
        logprobs: ``[B,R]`` log-probabilities of the sampled tokens at the sampling temperature.
        finished: ``[B]`` True where the response ended with EOS rather than at the length limit.
        engine_logprobs: ``[B,R]`` the same tokens' log-probabilities as the engine had them that
            drew them; None where that was the policy itself, or where they are of another
            distribution (``top_p`` below 1).
    """

    prompt_ids: tuple[np.ndarray, ...]
    input_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    logprobs: Float[Tensor, "batch response"]
    finished: Bool[Tensor, " batch"]
    engine_logprobs: Float[Tensor, "batch response"] | None = None


@dataclass(frozen=True)
class Experience:
    """A rollout with all that an update needs; every ``[B,R]`` tensor is 0 outside the mask."""

    rollout: Rollout
    ref_logprobs: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    rewards: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    scores: Float[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward source with its weight; exactly one of the first three is set.

    Attributes:
        model: Folder or hub id of a reward model (one label), with its tokenizer beside it.
        function: ``module:name`` of a Python function
            ``f(prompts, responses, references) -> list of floats``.
        metric: A sentence metric against the references, 0-100: ``chrf``,
            ``chrf1``, ``chrf++``, ``bleu``. ``chrf1`` is chrF with beta 1: sacreBLEU's default, 2,
            counts recall twice, which a longer answer raises.
        weight: Factor before the sum.
        timeout: Seconds that one call of a function may take; null waits for ever.
    """

    model: str | None = None
    function: str | None = None
    metric: Literal["chrf", "chrf1", "chrf++", "bleu"] | None = None
    weight: float = 1.0
    timeout: float | None = 3600.0


Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Name of a data set's column -> its value for each response."""


class RewardSource(Protocol):
    """Anything that gives one score to each response.

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
