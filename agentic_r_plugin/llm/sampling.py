"""Sample tokens from logits (temperature, top-k, top-p, log-probabilities) and detect stop strings.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sample(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    temperature: float,
    top_k: int = -1,
    top_p: float = 1.0,
    with_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample one token per row by inverting the cumulative distribution at `uniform_B`; temperature 0 takes the argmax.

    The result for a row depends only on its own logits and uniform number, never on other rows.

    Returns:
        Token ids `[B]`, and the log-probability of each under the distribution it was sampled from, after temperature,
        top-k and top-p (at temperature 0: of the unscaled logits), `[B]` or None. This matches vLLM's
        `logprobs_mode=processed_logprobs`, verl's default.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        token_B = logits_BV.argmax(dim=-1)
        return token_B, _logprob_of(logits_BV, token_B) if with_logprobs else None
    if temperature != 1:
        logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)
    if top_p < 1:
        logits_BV = _keep_top_p(logits_BV, top_p)
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # Capping at the largest float below the total keeps a number that rounds to 1 from selecting past the last token.
    point_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # right=True: a token of probability 0 has the cumulative value of the token before it and is never drawn.
    token_B = torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1)
    return token_B, _logprob_of(logits_BV, token_B) if with_logprobs else None


def _keep_top_p(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = ordered_BV.softmax(dim=-1)
    # Summed without the token itself: the one that crosses `top_p` is kept, so there is always at least one.
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter_(1, index_BV, before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, -torch.inf)


def _logprob_of(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    return logits_BV.gather(1, token_B[:, None]).squeeze(1) - logits_BV.logsumexp(dim=-1)


class StopStrings:
    """Detects when the last token of a row completes a stop string.

    To save time, a row is decoded only if the text of its new token contains the last character of a stop string, and
    then only its tail.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text)
        self._ends = {text[-1] for text in self.stop}
        # Every token contributes at least one byte, so a stop string of N bytes spans at most N tokens.
        self._tail = max((len(text.encode()) for text in self.stop), default=0) + 1
        self._may_end: dict[int, bool] = {}

    def completed_by_last(self, token_ids: Sequence[int]) -> str | None:
        """Return the stop string that the last token completes (the one that ends first), or None."""
        if not self.stop or not self._could_end(token_ids[-1]):
            return None
        tail = list(token_ids[-self._tail :])
        text, before = self._decode(tail), len(self._decode(tail[:-1]))
        # Searching from just before the last token skips stop strings that were complete without it.
        found = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self.stop]
        ends = sorted((at + len(stop), stop) for at, stop in found if at >= 0)
        return ends[0][1] if ends else None

    def _could_end(self, token_id: int) -> bool:
        known = self._may_end.get(token_id)
        if known is None:
            text = self._decode([token_id])  # U+FFFD: a part of a character, which may end a stop string
            known = self._may_end[token_id] = "\ufffd" in text or any(end in text for end in self._ends)
        return known

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
