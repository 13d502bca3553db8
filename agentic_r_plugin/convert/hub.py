"""The card of a converted data set, and its upload to the Hugging Face hub where the user asks for it."""

from __future__ import annotations

import re
from pathlib import Path

from agentic_r_plugin import hub
from agentic_r_plugin.hub import CARD, HubConfig
from agentic_r_plugin.store import shards

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def card(out: Path, text: str, *, rows: int, task: str, tags: list[str]) -> str:
    """A card: the hub's YAML header, then the text.

    Args:
        out: the finished data file, or folder of them. A single file gives its name to the split (`test.jsonl`: test).
        task: one of the hub's task categories.
    """
    from huggingface_hub import DatasetCardData

    names = [shard.name for shard in shards(out)]
    stem = names[0].partition(".")[0]
    split = stem if len(names) == 1 and re.fullmatch(r"[A-Za-z]\w*", stem) else "train"
    header = DatasetCardData(
        task_categories=[task],
        tags=["agentic-search", *tags],
        size_categories=_SIZES[min(max(0, len(str(rows)) - 3), len(_SIZES) - 1)],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": names}]}],
    )
    return f"---\n{header.to_yaml()}\n---\n\n{text}\n"


def push_file(config: HubConfig, text: str, *, rows: int, task: str, tags: list[str]) -> None:
    """Upload a finished data file, or folder of them, with a card of this text, if the settings ask for it.

    Raises:
        BackendError, ConfigError: as `push`.
    """
    if config.push_to_hub:
        push(config, card(Path(config.out), text, rows=rows, task=task, tags=tags))


def push(config: HubConfig, card: str) -> None:
    """Upload a finished output with its card, in one commit, and print the address of the data set.

    Raises:
        BackendError, ConfigError: as `hub.push`.
    """
    files = {shard.name: shard for shard in shards(config.out)}
    hub.push(config, {CARD: card.encode(), **files}, repo_type="dataset")
