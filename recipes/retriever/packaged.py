"""Where an installed package keeps its files; the package is not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(name: str, version: str) -> Path:
    """The folder of a package.

    Raises:
        SystemExit: it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this recipe needs the package {name}: pip install --no-deps {name}=={version}")
    return Path(spec.origin).parent
