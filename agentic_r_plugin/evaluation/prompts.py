"""The instruction of the released Search-R1 and Agentic-R agents, read from the installed FlashRAG."""

from __future__ import annotations

from flashrag.pipeline import SearchR1Pipeline

from agentic_r_plugin.errors import UpstreamError
from agentic_r_plugin.tags import TagProtocol


def _released() -> TagProtocol:
    instruction = getattr(SearchR1Pipeline, "user_prompt", "")
    if instruction.count("{question}") != 1:
        raise UpstreamError(
            "expected flashrag.pipeline.SearchR1Pipeline.user_prompt with one '{question}'; install flashrag-dev "
            "0.3.0.dev20260919, or evaluate with protocol=search_r1"
        )
    return TagProtocol(
        name="search_r1_released",
        description="Search-R1's tags with the instruction of the released agents, read from FlashRAG.",
        instruction=instruction,
    )


search_r1_released: TagProtocol = _released()
