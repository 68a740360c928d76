"""The layout against a row worked out by hand, and what must hold for every row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.tokens.packing import collate, counted_coordinates, pack, path
from align.types import Segment, TokenBatch, TokenGroup, TokenSequence


def sequence(ids: list[int], mask: list[bool] | None = None) -> TokenSequence:
    return TokenSequence(np.array(ids, np.int32), np.array(mask or [True] * len(ids)))


def group(prefix: list[int], *continuations: TokenSequence) -> TokenGroup:
    return TokenGroup(np.array(prefix, np.int32), continuations)


PAIR = group([1, 2, 3], sequence([4, 5]), sequence([6, 7, 8]))
LONE = group([], sequence([9, 10, 11], [True, False, True]))


def test_a_pair_and_a_lone_sequence_lie_in_one_row() -> None:
    batch = collate([PAIR, LONE])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]]
    # 6, the first token of `rejected`, is predicted by 3, the prompt's last
    assert batch.predictor.tolist() == [[0, 0, 1, 2, 3, 2, 5, 6, 8, 8, 9]]
    # the prompt never counts, nor does 9, which nothing predicts
    assert batch.loss_mask.tolist() == [[False] * 3 + [True] * 5 + [False, False, True]]
    assert batch.segments == (
        Segment(row=0, start=0, stop=3),
        Segment(row=0, start=3, stop=5, prefix_start=0, prefix_stop=3, sequence=0),
        Segment(row=0, start=5, stop=8, prefix_start=0, prefix_stop=3, sequence=1),
        Segment(row=0, start=8, stop=11, sequence=2),
    )


def test_a_second_prefix_is_found_where_it_lies() -> None:
    batch = collate([LONE, PAIR])
    assert batch.predictor.tolist() == [[0, 0, 1, 3, 3, 4, 5, 6, 5, 8, 9]]
    assert [(s.prefix_start, s.prefix_stop) for s in batch.segments] == [
        (0, 0),
        (0, 0),
        (3, 6),
        (3, 6),
    ]


def test_counted_coordinates() -> None:
    which, offset = counted_coordinates(collate([PAIR, LONE]))
    assert which.tolist() == [0, 0, 1, 1, 1, 2]
    assert offset.tolist() == [0, 1, 0, 1, 2, 2]


OPENING = [21, 22, 23, 24, 25, 26, 27, 28]


def with_opening() -> list[TokenGroup]:
    """A pair and a demonstration that open alike, as under one system prompt."""
    demonstration = [*OPENING, 9, 10, 11], [False] * 9 + [True, True]
    return [
        group([*OPENING, 1, 2], sequence([4, 5]), sequence([6])),
        group([], sequence(*demonstration)),
    ]


def test_what_all_groups_open_with_stands_in_the_row_once() -> None:
    batch = collate(with_opening())
    assert batch.input_ids.tolist() == [[*OPENING, 1, 2, 4, 5, 6, 9, 10, 11]]
    assert batch.position_ids[0, 8:].tolist() == [8, 9, 10, 11, 10, 8, 9, 10]
    assert batch.segment_ids[0, 8:].tolist() == [2, 2, 3, 3, 4, 5, 5, 5]
    continued = [(s.prefix_start, s.prefix_stop) for s in batch.segments]
    assert continued == [(0, 0), (0, 8), (8, 10), (8, 10), (0, 8)]
    assert batch.predictor[0, 8:].tolist() == [7, 8, 9, 10, 9, 7, 13, 14]
    assert batch.loss_mask[0, 8:].tolist() == [False] * 2 + [True] * 3 + [False, True, True]
    which, offset = counted_coordinates(batch)
    assert which.tolist() == [0, 0, 1, 2, 2]
    assert offset.tolist() == [0, 1, 0, 9, 10]
    columns = [path(batch, s) for s in batch.segments]
    assert columns[2] == [*range(10), 10, 11]
    assert columns[4] == [*range(8), 13, 14, 15]
    assert batch.num_tokens == 16


def test_the_opening_holds_nothing_that_counts_and_leaves_each_group_a_token() -> None:
    same = [group([], sequence([*OPENING, 1, 2], [False] * 8 + [True] * 2)) for _ in range(2)]
    assert collate(same).segments[0].stop == len(OPENING)
    counted = [group([], sequence([*OPENING, 1, 2])) for _ in range(2)]
    assert collate(counted).num_tokens == 20
    equal = [group([*OPENING, 1], sequence([2])) for _ in range(2)]
    assert [s.stop - s.start for s in collate(equal).segments] == [8, 1, 1, 1, 1]
    short = [group([1, 2, 3], sequence([n])) for n in (4, 5)]
    assert collate(short).num_tokens == 8


def test_every_microbatch_has_its_own_copy_of_the_opening_within_the_budget() -> None:
    groups = [group([*OPENING, n], sequence([n])) for n in range(30, 36)]
    batches = pack(groups, tokens_per_microbatch=18)
    assert [b.num_tokens for b in batches] == [12, 12, 12]
    assert sorted(s.sequence for b in batches for s in b.sequences) == list(range(6))


def test_many_answers_to_a_long_prompt_do_not_fill_memory_with_copies_of_its_keys() -> None:
    long = list(range(100, 300))
    groups = [group([*long, n], *(sequence([n]) for _ in range(50))) for n in range(1, 5)]
    batches = pack(groups, tokens_per_microbatch=10_000)
    # 200 shared tokens and 51 more each would all fit, but each answer has keys of 202 tokens
    assert [len(b.sequences) for b in batches] == [150, 50]


def test_packing_is_first_fit_by_falling_length_and_keeps_the_callers_numbers() -> None:
    groups = [group([], sequence(list(range(1, n + 1)))) for n in (3, 6, 4, 2, 5)]
    # by falling length 6 5 4 3 2 into 10: [6, 4], [5, 3, 2]
    batches = pack(groups, tokens_per_microbatch=10)
    assert [[s.sequence for s in b.sequences] for b in batches] == [[1, 2], [0, 3, 4]]


def test_nothing_to_collate_is_an_error() -> None:
    assert pack([], tokens_per_microbatch=8) == []
    with pytest.raises(ValueError, match="no group has a token"):
        collate([])


@st.composite
def group_lists(draw: st.DrawFn) -> list[TokenGroup]:
    """Every token id is used once, so that tokens can be followed."""
    shapes = draw(
        st.lists(
            st.tuples(st.integers(0, 5), st.lists(st.integers(1, 6), min_size=1, max_size=3)),
            min_size=1,
            max_size=8,
        )
    )
    groups, next_id = [], 1
    for len_prefix, lengths in shapes:
        prefix = list(range(next_id, next_id + len_prefix))
        next_id += len_prefix
        continuations = []
        for length in lengths:
            mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
            continuations.append(sequence(list(range(next_id, next_id + length)), mask))
            next_id += length
        groups.append(group(prefix, *continuations))
    return groups


@given(group_lists(), st.integers(1, 24))
def test_pack_keeps_every_token_once_within_the_budget(
    groups: list[TokenGroup], budget: int
) -> None:
    batches = pack(groups, tokens_per_microbatch=budget)
    ids = sorted(i for b in batches for i in b.input_ids[0].tolist())
    assert ids == list(range(1, sum(g.num_tokens for g in groups) + 1))
    for batch in batches:
        assert batch.num_tokens == batch.input_ids.numel()
        num_groups = len({id_of_group(groups, i) for i in batch.input_ids[0].tolist()})
        assert batch.num_tokens <= budget or num_groups == 1


@given(group_lists(), st.integers(1, 24))
def test_pack_says_where_every_token_stands(groups: list[TokenGroup], budget: int) -> None:
    expected = [
        (prefix, c.input_ids.tolist(), c.loss_mask.tolist())
        for g in groups
        for prefix in [g.prefix_ids.tolist()]
        for c in g.continuations
    ]
    found = {}
    for batch in pack(groups, tokens_per_microbatch=budget):
        ids = batch.input_ids[0].tolist()
        for number, s in enumerate(batch.segments, start=1):
            assert set(batch.segment_ids[0, s.start : s.stop].tolist()) == {number}
            if s.sequence >= 0:
                prefix, own, mask = expected[s.sequence]
                assert ids[s.prefix_start : s.prefix_stop] == prefix
                assert ids[s.start : s.stop] == own
                check_tokens(batch, s, prefix, own, mask)
                found[s.sequence] = True
    assert len(found) == len(expected)


def check_tokens(
    batch: TokenBatch, s: Segment, prefix: list[int], own: list[int], mask: list[bool]
) -> None:
    """Each token's position, and that its predictor is the token before it in its sequence."""
    whole = [*prefix, *own]
    for k in range(len(own)):
        column = s.start + k
        at = len(prefix) + k
        assert batch.position_ids[0, column] == at
        predicted_by = batch.input_ids[0, batch.predictor[0, column]]
        assert predicted_by == (whole[at - 1] if at else own[0])
        assert batch.loss_mask[0, column] == (mask[k] and at > 0)


def id_of_group(groups: list[TokenGroup], token: int) -> int:
    for n, g in enumerate(groups):
        token -= g.num_tokens
        if token <= 0:
            return n
    raise AssertionError("no group has this token")
