"""Retriever checkpoints: what training writes and everything else reads. The class itself lives with searching."""

from __future__ import annotations

from agentic_r_plugin.search.encoder import RECORD_FILE, Retriever, RetrieverRecord

__all__ = ["RECORD_FILE", "Retriever", "RetrieverRecord"]
