"""Run-time changes to verl, vLLM and FlashRAG: each is small, named, and bound to the release it was written for.

A hook is a function that changes one symbol of an upstream module. `apply` first checks that the distribution is the
pinned release and that the symbol exists; anything else is an error, so a symbol that has moved is never changed
silently. Each hook names the file in `patches/` that makes the same change to the sources.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_r_plugin.errors import UpstreamError


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One run-time change to an upstream package."""

    name: str
    distribution: str
    """Name on PyPI, such as `verl`."""
    versions: tuple[str, ...]
    """Releases it was written and tested for; a local version part such as `+cpu` is ignored."""
    symbol: str
    """`package.module:Name.attribute`: the symbol to change, which must exist."""
    patch: str
    """File in `patches/` that makes the same change to the sources."""
    install: Callable[[Any, str, Any], None]
    """Makes the change; arguments: the object that holds the symbol, the symbol's name there, and its current value."""


def apply(hooks: Sequence[Hook]) -> list[str]:
    """Apply every hook once, in order; a second call does nothing. Returns the names of the hooks applied now.

    Raises:
        UpstreamError: another release, or a symbol that does not exist there.
    """
    applied = []
    for hook in hooks:
        owner, attribute, value = resolve(hook)
        if hook.name in getattr(owner, _MARK, ()):
            continue
        hook.install(owner, attribute, value)
        setattr(owner, _MARK, (*getattr(owner, _MARK, ()), hook.name))
        applied.append(hook.name)
    return applied


def is_applied(hook: Hook) -> bool:
    """Whether the hook has been applied in this process."""
    return hook.name in getattr(resolve(hook)[0], _MARK, ())


def resolve(hook: Hook) -> tuple[Any, str, Any]:
    """The object that holds the hook's symbol, the symbol's name there, and its value.

    Raises:
        UpstreamError: another release, or a symbol that does not exist there.
    """
    check_version(hook.distribution, hook.versions, needed_by=f"hook {hook.name!r} ({hook.patch})")
    module_name, _, path = hook.symbol.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute, getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise UpstreamError(
            f"hook {hook.name!r}: {hook.symbol} is not in the installed {hook.distribution} as expected ({error}); "
            f"{hook.patch} has to be reviewed against the installed sources"
        ) from error


def check_version(distribution: str, versions: Sequence[str], *, needed_by: str) -> str:
    """The installed version of a distribution.

    Raises:
        UpstreamError: it is not installed, or its version is not one of `versions`.
    """
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        wanted = f"{distribution} {' or '.join(versions)}"
        raise UpstreamError(f"{needed_by} needs {wanted}, which is not installed") from error
    if installed.partition("+")[0] not in versions:
        raise UpstreamError(
            f"{needed_by} was written for {distribution} {' or '.join(versions)}, installed is {installed}: install "
            "the pinned release, or review the hook and its patch against the new sources"
        )
    return installed


_MARK = "_agentic_r_hooks"
