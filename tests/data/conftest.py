"""The tests of this folder share small helpers; a trained agent is made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `corpus.jsonl`, `train.jsonl` and a trained agent in `agent/`."""
    import torch

    from tests.data import tiny_world as tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_files(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loss = tiny.train_agent(folder / "agent")
    torch.set_num_threads(threads)
    assert loss < 0.2, "the agent has learnt its demonstrations"
    return folder
