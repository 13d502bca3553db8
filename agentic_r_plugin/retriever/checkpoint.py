"""Retriever checkpoints, written by training and read by everything else. The class itself is in `search.encoder`."""

from __future__ import annotations

from agentic_r_plugin.search.encoder import RECORD_FILE, Retriever, RetrieverRecord

__all__ = ["RECORD_FILE", "Retriever", "RetrieverRecord"]
