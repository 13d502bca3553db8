"""Keys and values of a batch that shrinks as rows finish, and of finished rows whose tokens may come again.

Legend: B rows, H key-value heads, C capacity in tokens, D head size, L layers.

`BatchCache` is a Hugging Face `Cache` whose layers are written in place: growing `DynamicCache` copies every key and
value at every token, which is most of the time of a small model on a CPU. Rows are right-aligned: all rows end at the
same write position, and row `r` begins at `write position - length of r`. A forward pass sees a window of it: some
rows, from some position on.

`PrefixStore` keeps the keys and values of finished rows, found again by blocks of tokens, so that the next turn of the
same trajectory (or another candidate with the same prefix) computes only what is new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the next forward pass sees and where it writes."""

    row: int = 0
    """Its first row."""
    start: int = 0
    """The first position it attends to."""
    position: int = 0
    """Where its tokens are written."""


class BatchLayer(CacheLayerMixin):
    """One layer's keys and values, `[B, H, C, D]`, preallocated; `update` writes where the owner's window says."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.capacity = 0, 0
        self.window = Window()
        self._storage: States | None = None

    def reserve(self, rows: int, capacity: int) -> None:
        """Lay out room for `rows` x `capacity` tokens, reusing the memory of earlier batches where it suffices."""
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
            flat = flat if flat.numel() >= needed else flat.new_zeros(needed)
            storage.append(flat)
            views.append(flat[:needed].view(self.rows, heads, self.capacity, size))
        self._storage = (storage[0], storage[1])
        self.keys, self.values = views

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> States:
        """Write the new `[b, H, q, D]` at the window's position and return the window up to and with them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.pair()
        first, start, position = self.window.row, self.window.start, self.window.position
        last, end = first + key_states.shape[0], position + key_states.shape[2]
        keys[first:last, :, position:end] = key_states
        values[first:last, :, position:end] = value_states
        return keys[first:last, :, start:end], values[first:last, :, start:end]

    def pair(self) -> States:
        """The whole room for keys and for values, `[B, H, C, D]` each."""
        assert self.keys is not None and self.values is not None, "nothing was written yet"
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.window.position - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self) -> int:
        return self.capacity


class BatchCache(Cache):
    """The layers of one batch; the caller moves the window before each forward pass."""

    def __init__(self, num_layers: int) -> None:
        self.batch_layers = [BatchLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.batch_layers])

    def reserve(self, rows: int, capacity: int) -> None:
        """Begin a batch of `rows`, each of at most `capacity` tokens, padding included."""
        for layer in self.batch_layers:
            layer.reserve(rows, capacity)

    def seek(self, window: Window) -> None:
        """Set what the next forward pass sees and where it writes."""
        for layer in self.batch_layers:
            layer.window = window

    def blank(self, row: int, end: int) -> None:
        """Zero the first `end` tokens of a row: masked positions must still be finite. New memory is zero as it is."""
        for layer in self.batch_layers:
            if layer.is_initialized:
                for states in layer.pair():
                    states[row, :, :end] = 0

    def move_row(self, source: int, target: int, end: int) -> None:
        """Copy row `source` over row `target`, up to `end` tokens."""
        for layer in self.batch_layers:
            for states in layer.pair():
                states[target, :, :end] = states[source, :, :end]

    def copy_out(self, row: int, start: int, end: int) -> list[States]:
        """Keys and values `[H, end - start, D]` of one row, per layer, as copies."""
        return [
            (keys[row, :, start:end].clone(), values[row, :, start:end].clone())
            for keys, values in (layer.pair() for layer in self.batch_layers)
        ]

    def copy_in(self, row: int, start: int, kept: Sequence[States], length: int) -> None:
        """Put the first `length` tokens of what `copy_out` gave at `start` of a row."""
        for layer, layer_kept in zip(self.batch_layers, kept, strict=True):
            for states, kept_states in zip(layer.pair(), layer_kept, strict=True):
                states[row, :, start : start + length] = kept_states[:, :length]


@dataclass(eq=False)
class _Entry:
    tokens: tuple[int, ...]
    blocks: list[int]
    states: list[States]


class PrefixStore:
    """Keys and values of finished rows, least recently used first out.

    Args:
        max_tokens: how many tokens to keep in all; 0 keeps nothing.
        block_size: prefixes are found in whole blocks of this many tokens.
    """

    def __init__(self, max_tokens: int, block_size: int = 16) -> None:
        self.max_tokens, self.block_size = max_tokens, block_size
        self.num_tokens = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_block: dict[int, _Entry] = {}

    def blocks(self, tokens: Sequence[int]) -> list[int]:
        """One key for each whole block, which stands for all tokens up to that block's end."""
        keys: list[int] = []
        key = 0
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            key = hash((key, tuple(tokens[end - self.block_size : end])))
            keys.append(key)
        return keys

    def find(self, tokens: Sequence[int]) -> tuple[int, list[States]]:
        """How many first tokens are stored, and the states that begin with them (empty when none are)."""
        if not self._entries:
            return 0, []
        for index, key in reversed(list(enumerate(self.blocks(tokens)))):
            entry = self._by_block.get(key)
            length = (index + 1) * self.block_size
            if entry is not None and entry.tokens[:length] == tuple(tokens[:length]):
                self._entries.move_to_end(id(entry))
                return length, entry.states
        return 0, []

    def add(self, tokens: Sequence[int], states: list[States]) -> None:
        """Keep a row; stored rows that are a beginning of it are dropped."""
        if len(tokens) < self.block_size or len(tokens) > self.max_tokens:
            return
        entry = _Entry(tokens=tuple(tokens), blocks=self.blocks(tokens), states=states)
        for key in entry.blocks:
            older = self._by_block.get(key)
            if older is not None and entry.tokens[: len(older.tokens)] == older.tokens:
                self._remove(older)
            self._by_block[key] = entry
        self._entries[id(entry)] = entry
        self.num_tokens += len(tokens)
        while self.num_tokens > self.max_tokens:
            self._remove(next(iter(self._entries.values())))

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._entries.clear()
        self._by_block.clear()
        self.num_tokens = 0

    def _remove(self, entry: _Entry) -> None:
        if self._entries.pop(id(entry), None) is None:
            return
        self.num_tokens -= len(entry.tokens)
        for key in entry.blocks:
            if self._by_block.get(key) is entry:
                del self._by_block[key]
