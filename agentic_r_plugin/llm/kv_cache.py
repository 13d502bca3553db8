"""Keys and values of the running batch, which shrinks as rows finish, and of finished rows that may be reused.

Legend: B rows, H key-value heads, C capacity in tokens, D head size, L layers.

`BatchCache` is a Hugging Face `Cache` whose layers are written in place. A growing `DynamicCache` copies every key and
value for every token, which dominates the time of a small model on a CPU. Rows are right-aligned: all rows end at the
same write position, and row `r` begins at `write position - length of r`. A forward pass sees a window of the cache: a
range of rows, from a start position on.

`PrefixStore` keeps the keys and values of finished rows in blocks of tokens, so that the next turn of the same
trajectory (or another candidate with the same prefix) computes only its new tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of the cache that the next forward pass reads, and where it writes."""

    row: int = 0
    """First row."""
    start: int = 0
    """First position attended to."""
    position: int = 0
    """Position at which the new tokens are written."""


class BatchLayer(CacheLayerMixin):
    """Preallocated keys and values `[B, H, C, D]` of one layer; `update` writes at the owner's window."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.capacity = 0, 0
        self.window = Window()
        self._storage: States | None = None

    def reserve(self, rows: int, capacity: int) -> None:
        """Provide space for `rows` x `capacity` tokens, reusing the memory of earlier batches if it is large enough."""
        self.rows, self.capacity, self.window = rows, capacity, Window()
        if self._storage is not None:
            self._lay_out()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._shapes = [(states.shape[1], states.shape[3]) for states in (key_states, value_states)]
        self._storage = (key_states.new_empty(0), value_states.new_empty(0))
        self._lay_out()
        self.is_initialized = True

    def _lay_out(self) -> None:
        assert self._storage is not None
        views, storage = [], []
        for flat, (heads, size) in zip(self._storage, self._shapes, strict=True):
            needed = self.rows * heads * self.capacity * size
            # New memory is zeroed because attention reads masked positions too, and these must be finite.
            flat = flat if flat.numel() >= needed else flat.new_zeros(needed)
            storage.append(flat)
            views.append(flat[:needed].view(self.rows, heads, self.capacity, size))
        self._storage = (storage[0], storage[1])
        self.keys, self.values = views

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> States:
        """Write the new `[b, H, q, D]` states at the window's position; return the window including them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.pair()
        first, start, position = self.window.row, self.window.start, self.window.position
        last, end = first + key_states.shape[0], position + key_states.shape[2]
        keys[first:last, :, position:end] = key_states
        values[first:last, :, position:end] = value_states
        return keys[first:last, :, start:end], values[first:last, :, start:end]

    def pair(self) -> States:
        """All keys and all values, `[B, H, C, D]` each."""
        assert self.keys is not None and self.values is not None, "nothing was written yet"
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.window.position - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self) -> int:
        return self.capacity


class BatchCache(Cache):
    """The cache of one batch; the caller sets the window before each forward pass."""

    def __init__(self, num_layers: int) -> None:
        self.batch_layers = [BatchLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.batch_layers])

    def reserve(self, rows: int, capacity: int) -> None:
        """Start a batch of `rows` rows with up to `capacity` tokens each, padding included."""
        for layer in self.batch_layers:
            layer.reserve(rows, capacity)

    def seek(self, window: Window) -> None:
        """Set the window of the next forward pass."""
        for layer in self.batch_layers:
            layer.window = window

    def blank(self, row: int, end: int) -> None:
        """Zero the first `end` tokens of a row: masked positions must be finite. New memory is already zero."""
        for layer in self.batch_layers:
            if layer.is_initialized:
                for states in layer.pair():
                    states[row, :, :end] = 0

    def move_row(self, source: int, target: int, end: int) -> None:
        """Copy the first `end` tokens of row `source` to row `target`."""
        for layer in self.batch_layers:
            for states in layer.pair():
                states[target, :, :end] = states[source, :, :end]

    def read(self, row: int, start: int, end: int) -> Iterator[torch.Tensor]:
        """Yield views of the keys and values `[H, end - start, D]` of one row, layer by layer."""
        for layer in self.batch_layers:
            for states in layer.pair():
                yield states[row, :, start:end]


@dataclass(frozen=True)
class _Block:
    tokens: tuple[int, ...]
    parent: int
    """Key of the previous block; 0 for the first block."""
    slot: int


class PrefixStore:
    """Keys and values for reuse, in blocks of tokens that rows with the same prefix share.

    A block is identified by its tokens and all tokens before it. The least recently used block is evicted first. A
    block always counts as used after the blocks that follow it, so that none outlives the blocks before it.

    Args:
        max_tokens: maximum number of stored tokens, shared ones counted once; 0 stores nothing.
        block_size: tokens per block; a shorter block at the end of a row is not stored.
    """

    def __init__(self, max_tokens: int, block_size: int = 16) -> None:
        self.max_tokens, self.block_size = max_tokens, block_size
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._free: list[int] = []
        self._slots = 0
        self._pools: list[torch.Tensor] = []  # keys and values of each layer, `[slots, H, block, D]`

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens."""
        return len(self._blocks) * self.block_size

    def blocks(self, tokens: Sequence[int]) -> list[int]:
        """Key of each full block, which depends on all tokens up to the end of that block."""
        return [key for key, _, _ in self._walk(tokens)]

    def _walk(self, tokens: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        key = 0
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            parent, chunk = key, tuple(tokens[end - self.block_size : end])
            key = hash((parent, chunk))
            yield key, parent, chunk

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Slots of the stored blocks of the longest stored prefix of `tokens`; marks them as most recently used."""
        found: list[tuple[int, int]] = []
        for key, parent, chunk in self._walk(tokens):
            block = self._blocks.get(key)
            if block is None or block.parent != parent or block.tokens != chunk:  # also on a hash collision
                break
            found.append((key, block.slot))
        for key, _ in reversed(found):  # first block last: eviction must start at the end of a prefix
            self._blocks.move_to_end(key)
        return [slot for _, slot in found]

    def length(self, tokens: Sequence[int]) -> int:
        """Length in tokens of the longest stored prefix."""
        return len(self.find(tokens)) * self.block_size

    def copy_in(self, cache: BatchCache, row: int, start: int, slots: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of the blocks at `slots` (from `find`) to position `start` of a row."""
        # Rounded up, because only the first tokens of the last block may be needed.
        used = torch.tensor(slots[: -(-length // self.block_size)], device=self._pools[0].device)
        for pool, target in zip(self._pools, cache.read(row, start, start + length), strict=True):
            # [slots, H, block, D] -> [H, length, D]
            target.copy_(pool[used].transpose(0, 1).flatten(1, 2)[:, :length])

    def add(self, tokens: Sequence[int], cache: BatchCache, row: int, start: int) -> None:
        """Store the full blocks of a row that starts at position `start` of the cache, except those already stored."""
        # A row that is longer than the store would evict its own beginning.
        if len(tokens) > self.max_tokens:
            return
        known = len(self.find(tokens))
        # Keys after the known prefix are new, except for a hash collision: the block of the other tokens stays, and
        # storing stops there because later blocks would lack their predecessor.
        new = list(takewhile(lambda block: block[0] not in self._blocks, islice(self._walk(tokens), known, None)))
        if not new:
            return
        # `find` has just marked the known prefix as used, so room is made by evicting other blocks.
        used = torch.tensor([self._take() for _ in new], device=next(cache.read(row, 0, 0)).device)
        # Inserted last block first, then the known prefix is marked as used: eviction order is from the end.
        for (key, parent, chunk), slot in zip(reversed(new), reversed(used.tolist()), strict=True):
            self._blocks[key] = _Block(chunk, parent, slot)
        self.find(tokens[: known * self.block_size])
        begin, end = start + known * self.block_size, start + (known + len(new)) * self.block_size
        for number, source in enumerate(cache.read(row, begin, end)):
            # [H, tokens, D] -> [blocks, H, block, D]
            blocks = source.unflatten(1, (len(new), self.block_size)).transpose(0, 1)
            self._pool(number, blocks)[used] = blocks

    def _take(self) -> int:
        """Return a free slot, evicting the least recently used block if none is free."""
        if self._free:
            return self._free.pop()
        if (self._slots + 1) * self.block_size > self.max_tokens:
            return self._blocks.popitem(last=False)[1].slot
        self._slots += 1
        return self._slots - 1

    def _pool(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Return the pool of one layer's keys or values, grown to hold all slots."""
        if number == len(self._pools):
            self._pools.append(like.new_empty((0, *like.shape[1:])))
        pool = self._pools[number]
        if len(pool) < self._slots:
            # At least doubled, so that the copies stay a constant factor of the stored tokens.
            larger = like.new_empty((max(self._slots, 2 * len(pool)), *like.shape[1:]))
            larger[: len(pool)] = pool
            pool = self._pools[number] = larger
        return pool

    def clear(self) -> None:
        """Discard all blocks, because the weights have changed; the memory is kept."""
        self._free = list(range(self._slots))
        self._blocks.clear()
