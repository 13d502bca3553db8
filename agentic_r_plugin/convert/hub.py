"""A data set folder: its card, and its upload to the Hugging Face hub where the user asks for it."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.credentials import read_secret, redacted
from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.store import atomic_path

CARD, DATA = "README.md", "train.jsonl"


def write_card(folder: Path, text: str, *, rows: int, tags: list[str]) -> None:
    """Write `README.md`: the hub's YAML header for `train.jsonl`, then the text."""
    from huggingface_hub import DatasetCardData

    sizes = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
    header = DatasetCardData(
        task_categories=["text-retrieval"],
        tags=["agentic-search", *tags],
        size_categories=sizes[min(max(0, len(str(rows)) - 3), len(sizes) - 1)],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA}]}],
    )
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(f"---\n{header.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def push(folder: Path, name: str, token_env: str) -> str:
    """Upload a finished folder as data set `name`, private if it is new; returns its address.

    Args:
        token_env: environment variable that holds the token; if it is unset, the token of `hf auth login` is used.

    Raises:
        BackendError: no network, no token, or no right to write. The local files are whole.
        ConfigError: the variable holds no token.
    """
    import httpx
    from huggingface_hub import HfApi

    token = read_secret(token_env, "token_env", required=False)
    api = HfApi(token=token)
    try:
        made = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, repo_type="dataset", ignore_patterns=[".*"])
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors derive from these
        raise BackendError(
            f"push_to_hub={name}: {redacted(f'{type(error).__name__}: {error}', token)}; {folder} is written and "
            "whole: the same command with --resume only uploads it"
        ) from None
    return str(made)
