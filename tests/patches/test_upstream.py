"""A hook changes what it was written for, once, and refuses anything else."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from agentic_r_plugin.errors import UpstreamError
from agentic_r_plugin.upstream import Hook, apply, check_version, is_applied

NUMPY = importlib.metadata.version("numpy")


def make_hook(name: str, symbol: str = "textwrap:shorten", versions: tuple[str, ...] = (NUMPY,)) -> Hook:
    def install(owner: Any, attribute: str, original: Any) -> None:
        setattr(owner, attribute, lambda text, *args: f"{name}({original(text, 80)})")

    return Hook(
        name=name, distribution="numpy", versions=versions, symbol=symbol, patch="patches/x.patch", install=install
    )


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    import textwrap

    monkeypatch.setattr(textwrap, "shorten", textwrap.shorten)
    monkeypatch.setattr(textwrap, "_agentic_r_hooks", (), raising=False)


def test_a_hook_is_applied_once() -> None:
    import textwrap

    hook = make_hook("first")
    assert not is_applied(hook)
    assert apply([hook]) == ["first"]
    assert apply([hook]) == []
    assert is_applied(hook)
    assert textwrap.shorten("a  b", 80) == "first(a b)"


def test_another_release_is_an_error_that_names_both_and_the_patch() -> None:
    with pytest.raises(UpstreamError, match=rf"first.*patches/x\.patch.*numpy 0\.0\.1, installed is {NUMPY}"):
        apply([make_hook("first", versions=("0.0.1",))])


def test_a_moved_symbol_is_an_error_that_names_it() -> None:
    for symbol in ("textwrap:shorten_away", "textwrap:TextWrapper.gone", "no_such_module:thing"):
        with pytest.raises(UpstreamError, match=symbol.replace(".", r"\.")):
            apply([make_hook("first", symbol=symbol)])


def test_a_missing_distribution_is_an_error() -> None:
    with pytest.raises(UpstreamError, match="needs no-such-distribution 1"):
        check_version("no-such-distribution", ["1"], needed_by="a test")


def test_a_local_version_part_does_not_count() -> None:
    torch_version = importlib.metadata.version("torch")
    assert check_version("torch", [torch_version.partition("+")[0]], needed_by="a test") == torch_version
