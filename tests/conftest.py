"""How two workers share the tests (`make test`); one worker takes them as they come. A fixture of several folders."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hub_server import hub

__all__ = ["hub"]

STARTS_RAY = (
    "tests/agent/cpu/test_ppo.py",
    "tests/agent/test_ppo_end_to_end.py",
    "tests/data/test_runner.py",
    "tests/llm/test_replicas.py",
    "tests/search/test_index_workers.py",
    "tests/test_child.py",
    "tests/test_loop.py",
)
"""One at a time, since each takes up to 4 GB and both cores, and before all others, since they take minutes."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's, so that what its tests share is made once; the files above are one unit."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file in STARTS_RAY else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=lambda item: item.nodeid.partition("::")[0] not in STARTS_RAY)
