"""Fingerprint of anything that a result was made from: a file, a folder, or a name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentic_r_plugin.store import file_fingerprint, sampled_fingerprint

LITE_FOLDER = "milvus.db"
"""Embedded database of an index. Its files change when it is opened; the index's manifest says what it holds."""


def path_fingerprint(where: str) -> str:
    """Fingerprint of a file, or of the names and contents of a folder's files; large files of a folder are sampled.

    Anything that is not a local path (a URL, the name of a model) is returned unchanged.
    """
    path = Path(where)
    if not where or not path.exists():
        return where
    if path.is_file():
        return file_fingerprint(path)
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file() and LITE_FOLDER not in item.parts):
        # Relative names: a folder that was moved keeps its fingerprint.
        digest.update(f"{file.relative_to(path)}:{sampled_fingerprint(file)}:".encode())
    return digest.hexdigest()[:16]
