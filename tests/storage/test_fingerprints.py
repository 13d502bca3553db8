"""What makes two folders the same for a result."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.storage.fingerprints import path_fingerprint


def test_a_folder_is_known_by_its_content_not_by_its_place(tmp_path: Path) -> None:
    large = bytes(3 << 20)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(large)
        (tmp_path / name / "config.json").write_text("{}")
    assert path_fingerprint(str(tmp_path / "a")) == path_fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(large[:-1] + b"x")
    assert path_fingerprint(str(tmp_path / "a")) != path_fingerprint(str(tmp_path / "b"))


def test_a_corpus_is_known_by_its_bytes_and_a_url_by_itself(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one\n")
    before = path_fingerprint(str(corpus))
    corpus.write_text("two\n")
    assert path_fingerprint(str(corpus)) != before
    assert path_fingerprint("http://127.0.0.1:8000") == "http://127.0.0.1:8000"
