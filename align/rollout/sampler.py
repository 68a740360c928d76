"""Sample responses: prefill each prompt once, drop finished sequences, refill their slots.

A prompt's keys and values are computed once for all its samples, over packed rows without padding.
The log-probability of every sampled token is taken from the logits that it was drawn from, at the
sampling temperature: these are PPO's old log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from align.config.sections import GenerationOptions
from align.data.tokens.packing import collate, path
from align.models.policy import Policy, check_length
from align.models.precision import autocast_once
from align.rollout.cache import SlotCache, recording_cache
from align.types import NonFiniteError, Rollout, TokenGroup

REFILL_SHARE = 0.25
"""Slots that must be free before new prompts are prefilled: small prefills waste a forward pass."""


class _Request:
    """One response in progress, with the uniform numbers that draw its tokens."""

    __slots__ = ("logprobs", "prompt", "row", "tokens", "uniforms")

    def __init__(self, row: int, prompt: np.ndarray, uniforms: list[float]) -> None:
        self.row, self.prompt, self.uniforms = row, prompt, uniforms
        self.tokens: list[int] = []
        self.logprobs: list[float] = []


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    options: GenerationOptions,
    *,
    end_ids: Sequence[int],
    seed: int,
    numbers: Sequence[int] | None = None,
    prefill_tokens: int = 4096,
    on_tokens: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample ``samples_per_prompt`` responses; row ``i * k + j`` is sample j of prompt i.

    Token t of sample j of prompt i is drawn by a random number that depends on (seed, i, j, t)
    only: slots, prefills and ranks do not change the samples, except by rounding. With
    ``temperature=0`` decoding is greedy and the log-probabilities are those at temperature 1.

    Args:
        prompts: int32 token ids of each prompt, at least one token each.
        end_ids: Token ids that end a response; the end token is part of the response.
        numbers: The i of each prompt, if these are a part of all prompts.
        prefill_tokens: Prompt tokens of one prefill: bounds memory, changes no result.
        on_tokens: Called with the number of tokens that each step produced.
    """
    longest = max(len(prompt) for prompt in prompts)
    check_length(policy, longest + options.max_new_tokens, "a prompt and its response may have")
    training = policy.training
    policy.eval()
    try:
        numbers = range(len(prompts)) if numbers is None else numbers
        requests = _requests(prompts, numbers, options, seed)
        with autocast_once(policy, policy.precision, policy.device):
            _Sampler(policy, options, end_ids, prefill_tokens).run(requests, on_tokens)
    finally:
        policy.train(training)
    return to_rollout(
        [r.prompt for r in requests],
        [r.tokens for r in requests],
        [r.logprobs for r in requests],
        end_ids=end_ids,
        device=policy.device,
    )


def _requests(
    prompts: Sequence[np.ndarray], numbers: Sequence[int], options: GenerationOptions, seed: int
) -> list[_Request]:
    k = options.samples_per_prompt

    def uniforms(number: int, j: int) -> list[float]:
        rng = np.random.default_rng([seed, number, j])
        return rng.random(options.max_new_tokens).tolist()

    return [
        _Request(i * k + j, prompt, uniforms(number, j))
        for i, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        for j in range(k)
    ]


class _Sampler:
    def __init__(
        self,
        policy: Policy,
        options: GenerationOptions,
        end_ids: Sequence[int],
        prefill_tokens: int,
    ) -> None:
        self.policy, self.options, self.end_ids = policy, options, frozenset(end_ids)
        self.prefill_tokens = prefill_tokens
        self.cache: SlotCache | None = None
        self.live: list[_Request | None] = []
        self.last = torch.zeros(0, dtype=torch.int64)

    def run(self, requests: Sequence[_Request], on_tokens: Callable[[int], None] | None) -> None:
        # longest prompts first: slots filled together then start at about the same column
        queue = sorted(requests, key=lambda r: (-len(r.prompt), r.row))[::-1]
        while queue or any(self.live):
            free = [i for i, request in enumerate(self.live) if request is None]
            if queue and (not any(self.live) or len(free) >= REFILL_SHARE * len(self.live)):
                made = self._admit(queue, free)
            else:
                if free and not queue:
                    self._compact()
                made = self._step()
            if on_tokens is not None:
                on_tokens(made)

    def _admit(self, queue: list[_Request], free: list[int]) -> int:
        """Prefill the next prompts of the queue and draw the first token of their responses."""
        if not any(self.live):
            # a slot for every request, even if only some fit into this prefill
            num_slots = min(self.options.slots, len(queue))
            self.cache, self.live, free = None, [None] * num_slots, list(range(num_slots))
        taken: list[_Request] = []
        distinct: dict[int, int] = {}  # id of a prompt array -> its number in this prefill
        tokens = 0
        while queue and len(taken) < len(free):
            prompt = queue[-1].prompt
            if id(prompt) not in distinct:
                tokens += len(prompt)
                if distinct and tokens > self.prefill_tokens:
                    break
                distinct[id(prompt)] = len(distinct)
            taken.append(queue.pop())
        first = {distinct[id(r.prompt)]: r.prompt for r in taken}
        groups = [TokenGroup(first[i], ()) for i in range(len(first))]
        batch = collate(groups).to(self.policy.device)
        record = recording_cache()
        hidden = self.policy.backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            past_key_values=record,
            use_cache=True,
            segments=batch.segments,
        ).last_hidden_state
        segments = batch.segments[-len(groups) :]  # a shared opening may come before them
        columns = [path(batch, segment) for segment in segments]
        places = [columns[distinct[id(r.prompt)]] for r in taken]
        slots = free[: len(taken)]
        if self.cache is None:
            longest = max(len(place) for place in places)
            self.cache = SlotCache(len(self.live), record, longest)
            self.last = torch.zeros(len(self.live), dtype=torch.int64, device=self.policy.device)
        self.cache.fill(slots, record, places)
        ends = torch.tensor([place[-1] for place in places], device=self.policy.device)
        for slot, request in zip(slots, taken, strict=True):
            self.live[slot] = request
        return self._draw(hidden[0, ends], slots)

    def _step(self) -> int:
        """Draw one more token for every live slot."""
        assert self.cache is not None
        decode = self.cache.next_step()
        positions = self.cache.length - self.cache.starts
        hidden = self.policy.backbone(
            input_ids=self.last[:, None],
            position_ids=positions.to(self.policy.device)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            decode=decode,
        ).last_hidden_state
        slots = [i for i, request in enumerate(self.live) if request is not None]
        rows = hidden[:, 0] if len(slots) == len(self.live) else hidden[slots, 0]
        return self._draw(rows, slots)

    def _draw(self, hidden: Tensor, slots: list[int]) -> int:
        """Sample a token for each listed slot, record it, and free the slots that are done."""
        assert self.cache is not None
        logits = self.policy.logits(hidden)
        requests = [request for request in (self.live[slot] for slot in slots) if request]
        # a token drawn from NaN would be arbitrary; minus infinity just forbids a token
        largest = logits.amax(-1).tolist()
        require_finite("the", "logits", largest, [request.row for request in requests])
        uniforms = torch.tensor(
            [request.uniforms[len(request.tokens)] for request in requests], dtype=torch.float64
        )
        tokens, logprobs = draw_tokens(logits, self.options, uniforms.to(logits.device))
        self.last[slots] = tokens
        drawn = zip(slots, requests, tokens.tolist(), logprobs.tolist(), strict=True)
        for slot, request, token, logprob in drawn:
            request.tokens.append(token)
            request.logprobs.append(logprob)
            if token in self.end_ids or len(request.tokens) == self.options.max_new_tokens:
                self.live[slot] = None
                self.cache.release(slot)
        return len(slots)

    def _compact(self) -> None:
        assert self.cache is not None
        keep = [i for i, request in enumerate(self.live) if request is not None]
        # copying the cache costs too: wait until an eighth of the slots is idle
        if len(keep) > 0.875 * len(self.live):
            return
        index = torch.tensor(keep)
        self.cache.keep(index)
        self.live = [self.live[i] for i in keep]
        self.last = self.last[index.to(self.last.device)]


def require_finite(article: str, what: str, values: Sequence[float], rows: Sequence[int]) -> None:
    """Refuse NaN and infinity; ``rows`` are the responses that ``values`` belong to."""
    bad = [(row, value) for row, value in zip(rows, values, strict=True) if not isfinite(value)]
    if bad:
        cure = "try precision=fp32, or lower optim.lr"
        raise NonFiniteError(
            f"sampling: {article} {what} became {bad[0][1]} on response {bad[0][0]}; the model's "
            f"weights are broken or its numbers overflow: {cure}",
            what=what,
            value=bad[0][1],
            rows=[row for row, _ in bad],
            cure=cure,
        )


def draw_tokens(
    logits: Tensor, options: GenerationOptions, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from ``[N,V]`` float32 logits: token ids ``[N]`` and log-probabilities ``[N]``, nats.

    Under ``top_p < 1`` the log-probabilities are still those of the untruncated distribution.
    """
    greedy = options.temperature == 0
    logits = logits if greedy else logits / options.temperature
    log_total = logits.logsumexp(-1, keepdim=True)
    if greedy:
        tokens = logits.argmax(-1)
    else:
        tokens = _choose(_nucleus((logits - log_total).exp_(), options.top_p), uniforms)
    return tokens, (logits.gather(-1, tokens[:, None]) - log_total)[:, 0]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Set to 0 all but the most probable tokens that together reach ``top_p``."""
    if top_p == 1:
        return probs
    ordered, order = probs.sort(-1, descending=True)
    # a token stays while the mass before it is below top_p: the first one always does
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


BLOCK = 256


def _choose(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one index per row of ``[N,V]`` weights by inverting their cumulative sum, float64.

    ``uniforms`` ``[N]``, float64 in [0, 1), are places in the cumulative sum. The draw has two
    steps, a block of the vocabulary and a token in it: `torch.multinomial` draws a random number
    for every entry, which on a CPU costs as much as the model's own products.
    """
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    mass = blocks.sum(-1).double()
    reached = mass.cumsum(-1)
    point = uniforms[:, None] * reached[:, -1:]
    block = _first_above(reached, point)
    inside = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]]
    before = (reached - mass).gather(-1, block)
    token = _first_above(inside.double().cumsum(-1), point - before)
    return (block * BLOCK + token)[:, 0]


def _first_above(reached: Tensor, point: Tensor) -> Tensor:
    """Return the first index whose cumulative sum exceeds ``point``, never one of weight 0."""
    # rounding may move the point to the very end
    point = torch.minimum(point, reached[:, -1:] * (1 - 1e-12))
    return torch.searchsorted(reached, point, right=True)


def to_rollout(
    prompts: Sequence[np.ndarray],
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    end_ids: Sequence[int],
    device: torch.device,
) -> Rollout:
    """Pad responses to a `Rollout`, one row each; each has at least one token."""
    lengths = torch.tensor([len(row) for row in tokens])
    width = int(lengths.max())
    input_ids = torch.zeros(len(tokens), width, dtype=torch.int64)
    padded = torch.zeros(len(tokens), width)
    for i, length in enumerate(lengths):
        input_ids[i, :length] = torch.tensor(tokens[i])
        padded[i, :length] = torch.tensor(logprobs[i])
    mask = torch.arange(width)[None] < lengths[:, None]
    finished = torch.tensor([row[-1] in end_ids for row in tokens])
    return Rollout(
        prompt_ids=tuple(prompts),
        input_ids=input_ids.to(device),
        response_mask=mask.to(device),
        logprobs=padded.to(device),
        finished=finished.to(device),
    )
