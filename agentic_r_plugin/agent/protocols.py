"""Protocols of released agents, which run unchanged; their prompts are read from the installed FlashRAG.

| protocol | searches | reads | answers | special settings |
|---|---|---|---|---|
| `search_r1_released` | `<search>` | `<information>` | `<answer>` | none |
| `r1_searcher` | `<|begin_of_query|>` | `<|begin_of_documents|>` | `<answer>` | prompt without chat template |
| `simple_deep_searcher` | `<|begin_search_query|>` | `<|begin_search_result|>` | `\\boxed{}` | at most 10 searches |

In the original agents a turn without search or answer ends the trajectory; `limits.max_malformed=0` does the same.
SimpleDeepSearcher's own evaluation uses a second model to summarise web pages; here, as in FlashRAG, the agent reads
the passages themselves.
"""

from __future__ import annotations

import flashrag.pipeline as pipelines

from agentic_r_plugin.errors import UpstreamError
from agentic_r_plugin.tags import TagProtocol

SIMPLE_DEEP_SEARCHER_SEARCHES = 10
"""Search limit stated in its prompt; run it with `limits.max_searches=10`."""

_PASSAGE = '({rank})Title: "{title}" Text: {text}'
_BLOCK = "\n\n{opening}\n{passages}\n\n{closing}\n\n"


def _prompt(pipeline: str) -> str:
    found = getattr(getattr(pipelines, pipeline, None), "user_prompt", "")
    if found.count("{question}") != 1:
        raise UpstreamError(
            f"expected flashrag.pipeline.{pipeline}.user_prompt with one '{{question}}'; install flashrag-dev "
            "0.3.0.dev20260919"
        )
    return str(found)


search_r1_released = TagProtocol(
    name="search_r1_released",
    description="Search-R1's tags with the instruction of the released agents, read from FlashRAG.",
    instruction=_prompt("SearchR1Pipeline"),
)

r1_searcher = TagProtocol(
    name="r1_searcher",
    description="R1-Searcher's tags; its prompt is read from FlashRAG.",
    instruction=_prompt("ReasoningPipeline"),
    search_tag="query",
    information_tag="documents",
    marks={
        "query": ("<|begin_of_query|>", "<|end_of_query|>"),
        "documents": ("<|begin_of_documents|>", "<|end_of_documents|>"),
    },
    chat=False,
    passage_form=_PASSAGE,
    block_form=_BLOCK,
    correction=(
        "\n\nThat was neither a query nor an answer. Write <|begin_of_query|> keywords <|end_of_query|> to search, or "
        "<answer> answer </answer> to finish.\n\n"
    ),
)

simple_deep_searcher = TagProtocol(
    name="simple_deep_searcher",
    description="SimpleDeepSearcher's tags and boxed answers; its prompt is read from FlashRAG.",
    instruction=(
        _prompt("SimpleDeepSearcherPipeline")
        .replace("{MAX_SEARCH_LIMIT}", str(SIMPLE_DEEP_SEARCHER_SEARCHES))
        .replace("{{", "{")  # FlashRAG fills its prompts with str.format, ours replaces {question} alone
        .replace("}}", "}")
    ),
    search_tag="search_query",
    information_tag="search_result",
    answer_tag="boxed",
    marks={
        "search_query": ("<|begin_search_query|>", "<|end_search_query|>"),
        "search_result": ("<|begin_search_result|>", "<|end_search_result|>"),
        "boxed": ("\\boxed{", "}"),
    },
    stop_at_answer=False,
    passage_form=_PASSAGE,
    block_form=_BLOCK,
    correction=(
        "\n\nThat was neither a search nor an answer. Write <|begin_search_query|> query <|end_search_query|> to "
        "search, or \\boxed{answer} to finish.\n\n"
    ),
)
