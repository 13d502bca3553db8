"""Batched generation with a Hugging Face causal language model, exact per row and fast for small models on a CPU.

Used by verl's CPU rollout engine and by the data stages. It calls the model's own forward pass with a cache that is
written in place, shrinks as rows finish, and keeps the keys and values of earlier turns, so that the next turn of a
trajectory computes only its new tokens. Prefixes shared by several prompts are computed once.

`tests/benchmarks/generation.py` compares it with `model.generate`, which takes 1.2 times as long on one turn and 1.9
times on three.

Legend: B rows of a batch, P padded prompt length, R prompt tokens to compute, V vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.llm import masks
from agentic_r_plugin.llm.kv_cache import BatchCache, PrefixStore, Window
from agentic_r_plugin.llm.sampling import StopStrings, sample

PREFILL_TOKENS = 512
"""Maximum prompt tokens per forward pass on a CPU, unless a single row has more: activations stay in the CPU's cache,
and long rows need no padding to equal length. Other devices use eight times as many."""

FinishReason = Literal["stop", "length", "eos"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated tokens of one prompt."""

    token_ids: tuple[int, ...]
    """Generated ids, including the one that ended the row (end of sequence, or the last token of a stop string)."""
    logprobs: tuple[float, ...] | None
    """Log-probability of each id under the distribution it was sampled from; None unless requested."""
    finish_reason: FinishReason
    stop_string: str | None
    """The stop string that ended the row, if the finish reason is `stop`."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from earlier calls or were shared within this call."""


@dataclass(kw_only=True, eq=False)
class _Row:
    index: int
    prompt: tuple[int, ...]
    max_tokens: int = 0
    uniform: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """A random number for each token that may be written."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    cached_tokens: int = 0
    scored: int = 0
    """Number of last prompt tokens whose log-probabilities are wanted."""


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    temperature: float
    top_p: float
    top_k: int
    with_logprobs: bool
    eos_ids: frozenset[int]
    stop: StopStrings


class HFGenerator:
    """Generates for many prompts at once. Not thread-safe.

    Args:
        model: Hugging Face causal language model with full or sliding-window attention, on its device.
        tokenizer: the model's tokenizer, used to find stop strings.
        max_batch_tokens: upper bound on the rows of a batch times their maximum length.
        prefix_cache_tokens: number of tokens whose keys and values are kept between calls (0: none).

    Raises:
        BackendError: a layer uses another kind of attention, or the model (of a type without tests) gives different
            log-probabilities here than in transformers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_batch_tokens: int = 32_768, prefix_cache_tokens: int = 0
    ) -> None:
        self.model, self.tokenizer, self.max_batch_tokens = model.eval(), tokenizer, max_batch_tokens
        self.attention = masks.inspect(model.config)
        masks.cap_logits(model)
        self.prefixes = PrefixStore(prefix_cache_tokens)
        self._cache = BatchCache(model.config.get_text_config().num_hidden_layers)
        self.eos_ids = _eos_ids(model, tokenizer)
        if model.config.get_text_config().model_type not in masks.TESTED:
            self._compare()
            self.weights_changed()  # the random prompts must not stay in the store

    def weights_changed(self) -> None:
        """Discard everything computed with the old weights."""
        self.prefixes.clear()

    @torch.inference_mode()
    def _compare(self) -> None:
        """Raise `BackendError` unless the sampled tokens have the log-probabilities of the model's own forward pass."""
        size = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(size, (33,), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [ids[:24], ids[24:]]  # different lengths, so that padding is tested too
        kind = self.model.config.get_text_config().model_type
        try:
            rows = self.generate(
                prompts, max_tokens=[6, 6], temperature=1.0, seed=0, with_logprobs=True, ignore_eos=True
            )
            for prompt, row in zip(prompts, rows, strict=True):
                whole = torch.tensor([[*prompt, *row.token_ids]], device=self.model.device)
                logits = self.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
                own = logits.float().log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0].cpu()
                error = (own - torch.tensor(row.logprobs)).abs().max().item()
                # `not <` also refuses NaN. Half precision gets a wider bound: its values depend on the order of sums.
                if not error < (1e-3 if logits.dtype == torch.float32 else 0.2):
                    raise BackendError(f"log-probabilities differ by {error:.3g}")
        except Exception as error:
            raise BackendError(
                f"models of type {kind} do not run here as in transformers ({type(error).__name__}: {error}); use "
                "another backend"
            ) from error

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = -1,
        seed: int | Sequence[int] | None = None,
        with_logprobs: bool = False,
        ignore_eos: bool = False,
    ) -> list[Generated]:
        """Continue every prompt until the end-of-sequence token, a stop string or its token limit.

        Args:
            prompts: token ids, at least one per prompt.
            max_tokens: maximum number of new tokens of each prompt.
            stop: a row ends with the token that completes one of these strings; the prompt's text does not count.
            temperature: 0 is greedy. top_p, top_k: 1.0 and -1 keep everything.
            seed: one seed for all rows (combined with their position), one seed per row, or None for a random seed.
                The samples of a row depend only on its own seed, not on the other rows.

        Raises:
            BackendError: an empty prompt, lists of different lengths, or a sequence longer than the model supports.
        """
        rows = _rows(prompts, max_tokens, seed)
        self.attention.require(max((len(row.prompt) + row.max_tokens for row in rows), default=0))
        eos_ids = frozenset() if ignore_eos else self.eos_ids
        sampling = _Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, with_logprobs=with_logprobs, eos_ids=eos_ids,
            stop=StopStrings(self.tokenizer, stop),
        )  # fmt: skip
        self._prefill_shared([row.prompt for row in rows])
        for batch in self._batches([row for row in rows if row.max_tokens > 0]):
            self._run(batch, sampling)
        return [
            Generated(
                token_ids=tuple(row.token_ids),
                logprobs=tuple(row.logprobs) if with_logprobs else None,
                # A row with max_tokens=0 never ran.
                finish_reason=row.finish_reason or "length",
                stop_string=row.stop_string,
                cached_tokens=row.cached_tokens,
            )
            for row in rows
        ]

    @torch.inference_mode()
    def likelihoods(self, texts: Sequence[Sequence[int]], scored: Sequence[int]) -> list[tuple[tuple[float, ...], int]]:
        """Log-probabilities of the last tokens of every text, and how many of its tokens were cached; one prefill each.

        Args:
            texts: token ids.
            scored: number of last tokens of each text, fewer than the text has.

        Raises:
            BackendError: a text is longer than the model supports.
        """
        rows = [
            _Row(index=index, prompt=tuple(text), scored=last)
            for index, (text, last) in enumerate(zip(texts, scored, strict=True))
        ]
        self.attention.require(max((len(row.prompt) for row in rows), default=0))
        # Scored tokens are predicted at the positions before them, which must be computed, not recalled.
        self._prefill_shared([row.prompt[: -1 - row.scored] for row in rows])
        self._prefill_and_keep(rows)
        return [(tuple(row.logprobs), row.cached_tokens) for row in rows]

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Group rows with similar numbers of new prompt tokens into batches within the token budget.

        New tokens are rounded to multiples of 64, so that rows with similar work are sorted by length.
        """
        work = {row.index: (len(row.prompt) - self.prefixes.length(row.prompt)) // 64 for row in rows}
        batch: list[_Row] = []
        longest = 0
        for row in sorted(rows, key=lambda row: (work[row.index], len(row.prompt), row.index)):
            length = max(longest, len(row.prompt) + row.max_tokens)
            # Rows are padded to the longest one, so the budget is rows times its length.
            if batch and length * (len(batch) + 1) > self.max_batch_tokens:
                yield batch
                batch, length = [], len(row.prompt) + row.max_tokens
            batch.append(row)
            longest = length
        if batch:
            yield batch

    def _prefill_shared(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute and store the prefixes that several prompts share and that are not stored yet.

        Shared prefixes form a tree, because a shared prefix may continue in several ways that are shared in turn. The
        tree is computed level by level, so that each prefix reuses the result of its parent.
        """
        if not self.prefixes.max_tokens:
            return
        blocks = [self.prefixes.blocks(prompt) for prompt in prompts]
        count = Counter(key for keys in blocks for key in keys)
        levels: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)
        for prompt, keys in zip(prompts, blocks, strict=True):
            kept, level = self.prefixes.length(prompt) // self.prefixes.block_size, 0
            for depth, key in enumerate(keys, start=1):
                ways_on = count[keys[depth]] if depth < len(keys) else 0
                # The prompts branch here: fewer share the next block. One new block alone is not worth a separate pass.
                if count[key] > max(ways_on, 1) and depth - kept >= 2:
                    levels[level][key] = tuple(prompt[: depth * self.prefixes.block_size])
                    kept, level = depth, level + 1
        for _, shared in sorted(levels.items()):
            self._prefill_and_keep([_Row(index=index, prompt=ids) for index, ids in enumerate(shared.values())])

    def _prefill_and_keep(self, rows: list[_Row]) -> None:
        """Compute prompts that nothing is written after, and store their keys and values."""
        for batch in self._batches(rows):
            padded = max(len(row.prompt) for row in batch)
            batch, _ = self._prefill(batch, padded, padded)
            for slot, row in enumerate(batch):
                self._keep(slot, row, padded)

    def _run(self, rows: list[_Row], sampling: _Sampling) -> None:
        """Prefill one batch and decode it to the end, removing rows as they finish."""
        padded = max(len(row.prompt) for row in rows)
        capacity = padded + max(row.max_tokens for row in rows)
        rows, logits_BV = self._prefill(rows, padded, capacity)
        device = logits_BV.device
        start_B = torch.tensor([padded - len(row.prompt) for row in rows], device=device)
        valid_BC = torch.arange(capacity, device=device) >= start_B[:, None]
        active, end = list(rows), padded
        while True:
            step, begin = end - padded, int(start_B.min())  # attention starts at the longest remaining row
            # All rows of a batch start together, so each has written `step` tokens.
            uniform_B = torch.stack([row.uniform[step] for row in active]).to(device)
            token_B, logprob_B = sample(
                logits_BV, uniform_B, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
                with_logprobs=sampling.with_logprobs,
            )  # fmt: skip
            logprobs = logprob_B.tolist() if logprob_B is not None else [0.0] * len(active)
            for row, token_id, logprob in zip(active, token_B.tolist(), logprobs, strict=True):
                _append(row, token_id, logprob, sampling)
            keep = self._drop_finished(active, end)
            if not keep:
                return
            if len(keep) < len(active):
                order = torch.tensor(keep, device=device)
                active = [active[slot] for slot in keep]
                token_B, start_B, valid_BC = token_B[order], start_B[order], valid_BC[order]
            end += 1
            self._cache.seek(Window(start=begin, position=end - 1))
            logits_BV = self.model(
                input_ids=token_B[:, None],
                attention_mask=self._mask(valid_BC[:, None, None, begin:end], end - 1, begin),
                position_ids=(end - 1 - start_B)[:, None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _prefill(self, rows: list[_Row], padded: int, capacity: int) -> tuple[list[_Row], torch.Tensor]:
        """Compute the new tokens of right-aligned prompts, after their stored prefixes.

        Rows are processed in several passes. All rows of a pass compute the same number R of last tokens, so that
        padding never overwrites stored keys and values.

        Returns:
            The rows in slot order (fewest new tokens first) and the logits `[B, V]` of their last tokens.
        """
        self._cache.reserve(len(rows), capacity)
        # A stored prefix may cover all tokens but the last ones, which must be computed to get their logits.
        kept = {row.index: self.prefixes.find(row.prompt[: -1 - row.scored]) for row in rows}
        count = {row.index: len(row.prompt) - len(kept[row.index]) * self.prefixes.block_size for row in rows}
        rows = sorted(rows, key=lambda row: count[row.index])
        new = [count[row.index] for row in rows]
        logits = []
        for first, last in _passes(new, PREFILL_TOKENS if self.model.device.type == "cpu" else 8 * PREFILL_TOKENS):
            # Rows with fewer new tokens compute some stored ones again, so that the pass is rectangular.
            num_new = max(new[first:last])
            for slot in range(first, last):
                self._recall(slot, rows[slot], kept[rows[slot].index], padded, num_new)
            found_BKV = self._compute(rows[first:last], first, padded, num_new)
            for row, found_KV in zip(rows[first:last], found_BKV, strict=True):
                if row.scored:
                    row.logprobs = _of_last(found_KV, row)
            logits.append(found_BKV[:, -1])
        return rows, torch.cat(logits)

    def _recall(self, slot: int, row: _Row, kept: list[int], padded: int, num_new: int) -> None:
        """Copy the stored keys and values of a row up to its last `num_new` tokens, and zero the padding before it."""
        start, recalled = padded - len(row.prompt), max(len(row.prompt) - num_new, 0)
        row.cached_tokens = recalled
        if recalled:
            self.prefixes.copy_in(self._cache, slot, start, kept, recalled)
        self._cache.blank(slot, start)  # masked values must still be finite: 0 * nan is nan

    def _compute(self, rows: list[_Row], slot: int, padded: int, num_new: int) -> torch.Tensor:
        """Compute the last `num_new` tokens of the rows from `slot` on; return the logits `[B, K, V]` of the last K.

        K is 1, or one more than the tokens of a row that are scored.
        """
        device = self.model.device
        start = padded - max(num_new, *(len(row.prompt) for row in rows))
        ids_BR = torch.zeros((len(rows), num_new), dtype=torch.long)
        for place, row in enumerate(rows):
            ids = torch.tensor(row.prompt[-num_new:])
            ids_BR[place, num_new - len(ids) :] = ids
        start_B = torch.tensor([padded - len(row.prompt) for row in rows], device=device)
        query_R = torch.arange(padded - num_new, padded, device=device)
        key_P = torch.arange(start, padded, device=device)
        causal_RP = key_P <= query_R[:, None]
        allowed_BRP = causal_RP & (key_P >= start_B[:, None, None])
        allowed_BRP = allowed_BRP | (key_P == query_R[:, None])  # padding attends to itself: no empty softmax
        self._cache.seek(Window(row=slot, start=start, position=padded - num_new))
        return self.model(
            input_ids=ids_BR.to(device),
            attention_mask=self._mask(allowed_BRP[:, None], padded - num_new, start),
            position_ids=(query_R - start_B[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 + max(row.scored for row in rows),
        ).logits

    def _mask(self, allowed: torch.Tensor, first_query: int, first_key: int) -> Any:
        """Build the mask for the model's attention: boolean for SDPA, else additive; a dict if there are two kinds of
        layers."""
        masks = self.attention.masks(allowed, first_query, first_key)
        # Eager attention, used for capped logits (`masks.cap_logits`), adds its mask to the logits.
        if self.model.config._attn_implementation != "sdpa":
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                kind: torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill(~mask, lowest)
                for kind, mask in masks.items()
            }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _drop_finished(self, active: list[_Row], end: int) -> list[int]:
        """Move the unfinished rows to the front of the cache; return their old slots in the new order."""
        # Finished rows are stored first, while their keys and values are still in place.
        keep = list(range(len(active)))
        for slot in [slot for slot, row in enumerate(active) if row.finish_reason is not None]:
            self._keep(slot, active[slot], end)
        # Each gap is filled with the last row instead of shifting all rows: one copy per finished row.
        last = len(keep) - 1
        for slot in reversed(range(len(active))):
            if active[slot].finish_reason is None:
                continue
            if slot != last:
                self._cache.move_row(last, slot, end)
                keep[slot] = keep[last]
            keep.pop()
            last -= 1
        return keep

    def _keep(self, slot: int, row: _Row, end: int) -> None:
        """Store the keys and values of a finished row, except for its last generated token, which has none yet."""
        if self.prefixes.max_tokens:
            tokens = (*row.prompt, *row.token_ids[:-1])
            self.prefixes.add(tokens, self._cache, slot, end - len(tokens))


def _of_last(logits_KV: torch.Tensor, row: _Row) -> list[float]:
    """Log-probabilities of a row's scored tokens; the logits of a token are at the position before it."""
    ids = torch.tensor(row.prompt[-row.scored :], device=logits_KV.device)
    logprobs_NV = logits_KV[-1 - row.scored : -1].float().log_softmax(-1)
    return [float(value) for value in logprobs_NV.gather(1, ids[:, None])[:, 0]]


def _passes(new: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (first, last + 1) that are computed in one forward pass, given the new tokens of each row.

    >>> list(_passes([900, 1000, 1100, 3000], 2048))
    [(0, 2), (2, 3), (3, 4)]
    """
    first = 0
    for last in range(1, len(new) + 1):
        if last == len(new) or max(new[first : last + 1]) * (last + 1 - first) > most:
            yield first, last
            first = last


def _append(row: _Row, token_id: int, logprob: float, sampling: _Sampling) -> None:
    row.token_ids.append(token_id)
    row.logprobs.append(logprob)
    if token_id in sampling.eos_ids:
        row.finish_reason = "eos"
    elif (stop_string := sampling.stop.completed_by_last(row.token_ids)) is not None:
        row.finish_reason, row.stop_string = "stop", stop_string
    elif len(row.token_ids) >= row.max_tokens:
        row.finish_reason = "length"


def _rows(prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], seed: int | Sequence[int] | None) -> list[_Row]:
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # The large factor keeps the rows of neighbouring seeds apart: row 1 of seed 0 differs from row 0 of seed 1.
    seeds = [seed * 1_000_003 + index for index in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if not len(prompts) == len(max_tokens) == len(seeds):
        raise BackendError(
            f"{len(prompts)} prompts, {len(max_tokens)} token limits, {len(seeds)} seeds: expected equal numbers"
        )
    rows = []
    for index, (prompt, limit, row_seed) in enumerate(zip(prompts, max_tokens, seeds, strict=True)):
        if not len(prompt):
            raise BackendError(f"prompt {index} is empty; a model needs at least one token to continue")
        # All draws of a row are made up front from its own seed, so they do not depend on the batch it runs in.
        uniform = torch.rand(max(limit, 0), generator=torch.Generator().manual_seed(row_seed % 2**63))
        rows.append(_Row(index=index, prompt=tuple(prompt), max_tokens=limit, uniform=uniform))
    return rows


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation configuration and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(token_id) for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
