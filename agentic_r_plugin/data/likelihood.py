"""The likelihood of the gold answer directly after a candidate: a signal of correctness without a rollout.

For each candidate, one prefill of the trajectory up to the query, the information block with that one passage, and the
turn that gives the first gold answer; the value is the log-probability of that answer. A thought that the chat template
has opened is ended before it. Searches that the agent would make after the candidate do not enter it. REPLUG and
IG-Search use the same signal.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Continuation, LLMBackend, count_tokens
from agentic_r_plugin.llm.reply import thought_end
from agentic_r_plugin.protocol import Session
from agentic_r_plugin.rollout import RolloutCost


def answer_likelihoods(
    sessions: Sequence[tuple[Session, str]], llm: LLMBackend, cost: RolloutCost
) -> list[float | None]:
    """Log-likelihood of an answer as the next turn of each session; None where it leaves no room or is refused.

    Args:
        sessions: a session that has just been shown its passages, and the answer.
        llm: the agent.
        cost: updated in place.

    Raises:
        ConfigError: the backend does not know the probability of a given text.
        BackendError: the model or its server failed.
    """
    if not hasattr(llm, "likelihoods"):
        raise ConfigError(
            f"correctness: the llm backend {type(llm).__name__} gives no likelihood of a text; use hf, vllm or openai"
        )
    asked: dict[int, Continuation] = {}
    for place, (session, answer) in enumerate(sessions):
        before, rest = session.protocol.answered(answer)
        before = thought_end(session.segments[-1].text) + before
        prompt, ids = (*session.ids, *session.codec.encode(before)), tuple(session.codec.encode(rest))
        if session.finished is None and len(prompt) + len(ids) <= session.limits.max_tokens:
            asked[place] = Continuation(prompt_ids=prompt, token_ids=ids)
    results: list[float | None] = [None] * len(sessions)
    for place, found in zip(asked, llm.likelihoods(list(asked.values())) if asked else [], strict=True):
        if not isinstance(found, RequestRefusedError):
            count_tokens(cost, found)
            results[place] = sum(found.logprobs)
    return results
