"""Uploads to a hub on loopback: one private data set, one commit with data and card, and no token in sight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from agentic_r_plugin import cli
from tests.hub_server import TOKEN, committed

QUESTIONS = [{"id": "1", "question": "Where was Ann born?", "golden_answers": ["Oslo"]}]
PASSAGES = [{"id": "7", "title": "Ann", "text": "Ann was born in Oslo."}]
CHAT = {
    "id": "1",
    "messages": [
        {"role": "user", "content": "Where was Ann born?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "function": {"name": "search", "arguments": '{"query": "Ann"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": json.dumps([{"id": "7", "text": "Ann was born in Oslo."}])},
        {"role": "assistant", "content": "Oslo"},
    ],
}  # fmt: skip


def command(kind: str, folder: Path) -> tuple[list[str], Path]:
    """Arguments of a conversion, and its output."""
    for name, rows in (("questions", QUESTIONS), ("articles", PASSAGES), ("chat", [CHAT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "questions": ["in=questions.jsonl"],
        "corpus": ["in=articles.jsonl"],
        "trajectories": ["in=chat.jsonl", "corpus=articles.jsonl", "questions=questions.jsonl"],
    }[kind]
    out = folder / "dev.jsonl"
    paths = [f"{name}={folder / value}" for name, value in (text.split("=") for text in given)]
    return ["convert", kind, *paths, f"out={out}"], out


@pytest.mark.parametrize("kind", ["questions", "corpus", "trajectories"])
def test_a_conversion_is_uploaded_with_its_card_in_one_commit(tmp_path, hub, capfd, kind):
    given, out = command(kind, tmp_path)
    assert cli.main([*given, "push_to_hub=me/set"]) == 0
    assert {authorization for _, authorization, _ in hub.requests} == {f"Bearer {TOKEN}"}
    made = json.loads(next(body for path, _, body in hub.requests if path == "/api/repos/create"))
    assert made["type"] == "dataset" and made.get("visibility", made.get("private")) in ("private", True)
    files = committed(hub.requests)
    assert set(files) == {"README.md", "dev.jsonl"} and files["dev.jsonl"] == out.read_bytes()
    _, header, text = files["README.md"].decode().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (
        fields["configs"] == [{"config_name": "default", "data_files": [{"split": "dev", "path": ["dev.jsonl"]}]}]
        and fields["size_categories"] == "n<1K"
    )
    assert {"questions": "1 questions, 1 with gold answers", "corpus": "1 passages of 1 documents",
            "trajectories": "1 trajectories with 1 searches"}[kind] in text  # fmt: skip
    shown = capfd.readouterr()
    assert f"{hub.url}/datasets/me/set" in shown.out and TOKEN not in shown.out + shown.err
    assert not any(TOKEN in path.read_text() for path in tmp_path.iterdir())


def test_groups_are_uploaded_with_the_card_that_is_next_to_them(tmp_path, hub):
    command("corpus", tmp_path)
    group = {"id": "1", "turn": 1, "question": "Q?", "query": "q", "history": [], "positive": "7", "negatives": []}
    (tmp_path / "groups.jsonl").write_text(json.dumps({"schema": "group/1"} | group) + "\n")
    given = [f"in={tmp_path / 'groups.jsonl'}", f"corpus={tmp_path / 'articles.jsonl'}", f"out={tmp_path / 'set'}"]
    given += ["to=tevatron", "retriever=builtin:minilm", "--query-prompt", "", "--passage-prompt", ""]
    assert cli.main(["convert", "groups", *given, "push_to_hub=me/set"]) == 0
    names = ("README.md", "train.jsonl")
    assert committed(hub.requests) == {name: (tmp_path / "set" / name).read_bytes() for name in names}


def test_a_refused_upload_shows_no_token_and_a_resume_only_uploads(tmp_path, hub, capfd):
    given, out = command("questions", tmp_path)
    hub.refuse = True
    assert cli.main([*given, "push_to_hub=me/set"]) == 1
    shown = capfd.readouterr()
    assert "push_to_hub=me/set" in shown.err and "--resume only uploads" in shown.err and "403" in shown.err
    assert TOKEN not in shown.out + shown.err
    written = out.stat().st_mtime_ns
    hub.refuse = False
    hub.requests.clear()
    assert cli.main([*given, "push_to_hub=me/set", "--resume"]) == 0
    assert set(committed(hub.requests)) == {"README.md", "dev.jsonl"} and out.stat().st_mtime_ns == written


def test_a_card_has_the_files_of_a_folder_as_one_split(tmp_path):
    from agentic_r_plugin.convert.hub import card

    for name in ("00000.jsonl", "00001.jsonl", ".report.json"):
        (tmp_path / name).write_text("{}")
    fields = yaml.safe_load(card(tmp_path, "# T", rows=21_015_324, task="text-retrieval", tags=[]).split("---")[1])
    assert fields["configs"][0]["data_files"] == [{"split": "train", "path": ["00000.jsonl", "00001.jsonl"]}]
    assert fields["size_categories"] == "10M<n<100M"
