"""Upload of a finished output to the Hugging Face hub, where the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentic_r_plugin.config import FREE, setting
from agentic_r_plugin.credentials import read_secret, redacted
from agentic_r_plugin.errors import BackendError

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Settings of a command whose output can be uploaded."""

    out: str
    push_to_hub: str = setting("repository NAME/REPO to upload to, private if it is new; empty: none", FREE, default="")
    token_env: str = setting("variable with the hub's token; unset: that of `hf auth login`", FREE, default="HF_TOKEN")


def push_folder(config: HubConfig) -> None:
    """Upload a finished model folder without its hidden files, if the settings ask for it.

    Raises:
        BackendError, ConfigError: as `push`.
    """
    if config.push_to_hub:
        out = Path(config.out)
        names = [path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file()]
        shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        push(config, {str(name): out / name for name in shown}, repo_type="model")


def push(config: HubConfig, files: Mapping[str, Path | bytes], *, repo_type: str) -> None:
    """Upload the files of a finished output in one commit, and print the address of the repository.

    The repository is private if it is new.

    Args:
        files: path in the repository -> content, or the file that holds it.
        repo_type: `dataset` or `model`.

    Raises:
        BackendError: no network, no token, or no right to write. The local files are whole.
        ConfigError: the variable holds no token.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    token = read_secret(config.token_env, "token_env", required=False)
    api = HfApi(token=token)
    try:
        made = api.create_repo(config.push_to_hub, repo_type=repo_type, private=True, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Upload by agentic-r",
            repo_type=repo_type,
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors derive from these
        raise BackendError(
            f"push_to_hub={config.push_to_hub}: {redacted(f'{type(error).__name__}: {error}', token)}; {config.out} is "
            "complete on disk: the same command with --resume only uploads it"
        ) from None
    print(made)
