"""The card of a converted data set, and its upload to the Hugging Face hub where the user asks for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from agentic_r_plugin.config import FREE
from agentic_r_plugin.credentials import read_secret, redacted
from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.store import shards

CARD = "README.md"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Settings of a conversion whose output can be uploaded."""

    out: str
    push_to_hub: str = field(
        default="", metadata={"help": "data set NAME/SET to upload to, private if it is new; empty: none", **FREE}
    )
    token_env: str = field(
        default="HF_TOKEN", metadata={"help": "variable with the hub's token; unset: that of `hf auth login`", **FREE}
    )


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

    The data set is private if it is new.

    Raises:
        BackendError: no network, no token, or no right to write. The local files are whole.
        ConfigError: the variable holds no token.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    token = read_secret(config.token_env, "token_env", required=False)
    api = HfApi(token=token)
    files = [CommitOperationAdd(shard.name, shard) for shard in shards(config.out)]
    try:
        made = api.create_repo(config.push_to_hub, repo_type="dataset", private=True, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(CARD, card.encode()), *files],
            commit_message="agentic-r convert",
            repo_type="dataset",
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors derive from these
        raise BackendError(
            f"push_to_hub={config.push_to_hub}: {redacted(f'{type(error).__name__}: {error}', token)}; {config.out} is "
            "written and whole: the same command with --resume only uploads it"
        ) from None
    print(made)
