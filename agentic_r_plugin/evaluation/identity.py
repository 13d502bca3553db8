"""Tells whether a folder is the one that a result was made from, without reading large files whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from agentic_r_plugin.store import file_fingerprint

_SAMPLED_BYTES = 1 << 16
_WHOLE_BYTES = 1 << 20


def identity(where: str) -> str:
    """What a directory holds, without reading large files whole: sizes, and bytes from begin, middle and end.

    Anything that is no file or directory here (a URL, a model's name) is its own identity.
    """
    path = Path(where.removeprefix("bm25:"))
    if path.is_file():
        return file_fingerprint(path)
    if not path.is_dir():
        return where
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for offset in (0, size // 2, size - _SAMPLED_BYTES):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]
