"""Questions as a verl data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentic_r_plugin import components
from agentic_r_plugin.agent.dataset import SourcedQuestion, fitting, read_sourced_questions, write_parquet
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import write_records

PROTOCOL = components.load("agent_protocol", "search_r1")
RECORDS = [
    Question(id="a", question="Who wrote Emma?", golden_answers=("Jane Austen", "Austen")),
    Question(id="b", question="Who?", golden_answers=("x",)),
]
QUESTIONS = [
    SourcedQuestion(record=question, source=source)
    for question, source in zip(RECORDS, ("nq", "hotpotqa"), strict=True)
]


def test_verl_reads_the_rows_as_our_loop_and_reward_need_them(tmp_path: Path, agent_dir: Path) -> None:
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    write_parquet(tmp_path / "train.parquet", QUESTIONS, PROTOCOL)
    config = OmegaConf.create({"prompt_key": "prompt", "filter_overlong_prompts": False, "cache_dir": str(tmp_path)})
    row: dict[str, Any] = RLHFDataset(
        str(tmp_path / "train.parquet"), AutoTokenizer.from_pretrained(agent_dir), config
    )[0]
    assert row["raw_prompt"] == [{"role": "user", "content": PROTOCOL.prompt("Who wrote Emma?")}]
    assert row["data_source"] == "nq"
    assert row["reward_model"]["ground_truth"] == ["Jane Austen", "Austen"]
    assert row["extra_info"]["id"] == "a"
    assert row["extra_info"]["question"] == "Who wrote Emma?"
    assert row["extra_info"]["golden_answers"] == ["Jane Austen", "Austen"]
    assert row["index"] == 0


def test_a_file_made_for_verl_gives_back_its_questions_and_their_benchmarks(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", QUESTIONS, PROTOCOL)
    assert read_sourced_questions(tmp_path / "train.parquet") == QUESTIONS


def test_a_broken_line_is_named_and_an_id_must_be_unique(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": "a", "question": "Q", "golden_answers": []}\n')
    with pytest.raises(RecordError, match=r"train\.jsonl:1: question 'a' has no golden answers"):
        read_sourced_questions(path)
    write_records(path, [RECORDS[0], RECORDS[0]])
    with pytest.raises(RecordError, match=r"train\.jsonl:2: question id 'a' occurs twice"):
        read_sourced_questions(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="at least one question"):
        read_sourced_questions(path)


def test_questions_whose_prompts_leave_no_room_are_left_out_and_counted(agent_dir: Path, capsys) -> None:
    from transformers import AutoTokenizer

    codec = TokenizerCodec(AutoTokenizer.from_pretrained(agent_dir))
    kept, lengths = fitting(QUESTIONS, PROTOCOL, codec, Limits())
    assert kept == QUESTIONS and lengths == [len(codec.encode(PROTOCOL.prompt(item.question))) for item in RECORDS]
    long = replace(QUESTIONS[0], record=replace(QUESTIONS[0].record, id="long", question="Who? " * 500))
    limits = Limits(max_tokens=max(lengths) + 1)
    assert fitting([*QUESTIONS, long], PROTOCOL, codec, limits) == (QUESTIONS, lengths)
    assert f"1 of {len(QUESTIONS) + 1} questions; the longest, of question 'long', takes" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"max_tokens=5 leaves no room after the prompts of .*; raise the limit"):
        fitting(QUESTIONS, PROTOCOL, codec, Limits(max_tokens=5))
