"""Blocks of keys and values that rows share: found again exactly, counted once, dropped from the end of a beginning."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_r_plugin.llm.kv_cache import BatchCache, PrefixStore, Window

LAYERS, HEADS, SIZE, CAPACITY, BLOCK = 2, 2, 4, 40, 4


def cache_of(rows: int) -> BatchCache:
    """A cache whose memory is laid out, filled with numbers that are not looked for."""
    cache = BatchCache(LAYERS)
    cache.reserve(rows, CAPACITY)
    cache.seek(Window())
    for layer in cache.batch_layers:
        layer.update(torch.full((rows, HEADS, CAPACITY, SIZE), -1.0), torch.full((rows, HEADS, CAPACITY, SIZE), -1.0))
    return cache


def states_of(tokens: list[int]) -> list[torch.Tensor]:
    """Keys and values `[H, L, D]` per layer that depend on all tokens up to each one, as a model's do."""
    so_far = torch.tensor([hash(tuple(tokens[: end + 1])) % 1009 for end in range(len(tokens))], dtype=torch.float32)
    return [
        (so_far + 10_000 * number)[None, :, None].expand(HEADS, -1, SIZE).contiguous() for number in range(2 * LAYERS)
    ]


def keep(store: PrefixStore, tokens: list[int], start: int = 3) -> None:
    cache = cache_of(2)
    for target, states in zip(cache.read(1, start, start + len(tokens)), states_of(tokens), strict=True):
        target.copy_(states)
    store.add(tokens, cache, 1, start)


def recalled(store: PrefixStore, tokens: list[int], length: int) -> list[torch.Tensor]:
    cache = cache_of(3)
    store.copy_in(cache, 2, 5, store.find(tokens), length)
    return [states.clone() for states in cache.read(2, 5, 5 + length)]


sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(sequences, st.sampled_from([8, 32, 400]))
def test_what_is_found_is_what_was_kept_and_no_more_than_allowed(rows: list[list[int]], max_tokens: int) -> None:
    store = PrefixStore(max_tokens, BLOCK)
    for number, tokens in enumerate(rows):
        keep(store, tokens)
        assert store.num_tokens <= max_tokens and store._slots * BLOCK <= max_tokens
        if len(tokens) <= max_tokens:
            assert store.length(tokens) == len(tokens) // BLOCK * BLOCK, "the newest row is kept wholly"
        for earlier in rows[: number + 1]:
            if length := store.length(earlier):
                expected = [states[:, : length - 1] for states in states_of(earlier)]
                torch.testing.assert_close(recalled(store, earlier, length - 1), expected, rtol=0, atol=0)


def test_a_beginning_that_rows_share_is_counted_once_and_outlives_the_row_that_brought_it() -> None:
    store, shared = PrefixStore(24, BLOCK), [1, 2, 3, 4, 5, 6, 7, 8]
    keep(store, [*shared, 10, 11, 12, 13])
    keep(store, [*shared, 20, 21, 22, 23])
    assert store.num_tokens == 16
    keep(store, [*shared, 30, 31, 32, 33, 34, 35, 36, 37])
    assert store.num_tokens == 24
    keep(store, [*shared, 40, 41, 42, 43])  # the oldest end makes room
    assert store.length([*shared, 10, 11, 12, 13]) == 8
    assert [store.length([*shared, *[n + i for i in range(4)]]) for n in (20, 30, 40)] == [12, 12, 12]


def test_nothing_is_found_after_the_weights_changed_and_the_room_is_used_again() -> None:
    store, tokens = PrefixStore(16, BLOCK), list(range(16))
    keep(store, tokens)
    store.clear()
    assert (store.find(tokens), store.num_tokens) == ([], 0)
    keep(store, tokens)
    assert store.length(tokens) == 16 and store._slots == 4
