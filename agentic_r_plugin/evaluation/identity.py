"""Tells whether a folder is the one that a result was made from, without reading large files whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentic_r_plugin.store import file_fingerprint, sampled_fingerprint


def identity(where: str) -> str:
    """What a directory holds, without reading large files whole (`store.sampled_fingerprint`).

    Anything that is no file or directory here (a URL, a model's name) is its own identity.
    """
    path = Path(where.removeprefix("bm25:"))
    if not where or not path.exists():
        return where
    if path.is_file():
        return file_fingerprint(path)
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path)}:{sampled_fingerprint(file)}:".encode())
    return digest.hexdigest()[:16]
