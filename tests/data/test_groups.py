"""The command `groups`: files in, groups and counts out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.config import load_config
from agentic_r_plugin.data.candidates import check_protocol
from agentic_r_plugin.data.groups import GroupsConfig, run
from agentic_r_plugin.errors import ConfigError, RecordError, RequestRefusedError
from agentic_r_plugin.records import (
    Candidates,
    Correctness,
    Group,
    Relevance,
    ScoredPassage,
    StopReason,
    Trajectory,
    Turn,
)
from agentic_r_plugin.store import file_fingerprint, read_json, read_records, write_json, write_records

PASSAGES = tuple(f"p{number:02}" for number in range(20))


@pytest.fixture
def config(tmp_path: Path) -> GroupsConfig:
    """Query 0 has one positive, 1 two tied ones, 2 none correct, 3 none relevant, 4 no relevance, 5 no rollouts."""
    base = Candidates(
        id="", turn=1, question="Q", golden_answers=("x",), query="q", history=("h",), prefix="",
        passages=tuple(ScoredPassage(id=passage, score=1.0) for passage in PASSAGES),
    )  # fmt: skip
    low = dict.fromkeys(PASSAGES, 10)
    relevance = [low | {"p03": 90}, low | {"p05": 80, "p04": 80}, low | {"p01": 60}, low, None, low | {"p01": 60}]
    correctness = [{"p03": 1}, {"p04": 1, "p05": 1}, {"p01": 0}, {}, {}, {}]
    write_records(tmp_path / "c.jsonl", [replace(base, id=str(number)) for number in range(6)])
    write_records(
        tmp_path / "r.jsonl",
        [Relevance(id=str(n), turn=1, scores=scores) for n, scores in enumerate(relevance) if scores is not None],
    )
    write_records(
        tmp_path / "g.parquet",
        [
            Correctness(id=str(n), turn=1, passage_id=passage, em=em, answer=None, searches=0)
            for n, of_query in enumerate(correctness)
            for passage, em in of_query.items()
        ],
    )
    return GroupsConfig(
        candidates=str(tmp_path / "c.jsonl"),
        relevance=str(tmp_path / "r.jsonl"),
        correctness=str(tmp_path / "g.parquet"),
        out=str(tmp_path / "out.jsonl"),
    )


def picked(config: GroupsConfig) -> list[tuple[str, str]]:
    run(config)
    return [(group.id, group.positive) for group in read_records(config.out, Group)]


def test_groups_are_written_and_every_dropped_query_is_counted_by_its_reason(config: GroupsConfig):
    assert picked(config) == [("0", "p03"), ("1", "p04")]
    first, _ = read_records(config.out, Group)
    assert len(set(first.negatives)) == 15 and first.positive not in first.negatives
    assert first.history == ("h",)
    report = read_json(config.out + ".report.json")
    assert (report["read"], report["kept"], report["records"]) == (6, 2, 2)
    assert report["dropped"] == {
        "no_correct_candidate": 1, "no_relevance": 1, "not_rolled_out": 1, "relevance_below_threshold": 1,
    }  # fmt: skip


def test_the_released_codes_preset_makes_a_group_of_every_tie(config: GroupsConfig):
    assert picked(replace(config, preset="released_code")) == [("0", "p03"), ("1", "p04"), ("1", "p05")]


def test_the_order_of_queries_does_not_change_their_groups(config: GroupsConfig, tmp_path: Path):
    run(config)
    backwards = list(read_records(config.candidates, Candidates))[::-1]
    write_records(tmp_path / "back.jsonl", backwards)
    other = replace(config, candidates=str(tmp_path / "back.jsonl"), out=str(tmp_path / "back.out.jsonl"))
    run(other)
    assert list(read_records(other.out, Group)) == list(read_records(config.out, Group))[::-1]


def test_ablations_need_only_their_own_file(config: GroupsConfig):
    without_correctness = replace(config, use_correctness=False, correctness="", out=config.out + "1.jsonl")
    assert picked(without_correctness) == [("0", "p03"), ("1", "p04"), ("2", "p01"), ("5", "p01")]
    without_relevance = replace(config, use_relevance=False, relevance="", out=config.out + "2.jsonl")
    with pytest.raises(RecordError, match="correctness of passage 'p00' is needed and unknown"):
        run(without_relevance)


def test_correctness_that_names_a_passage_twice_refuses_its_query(config: GroupsConfig, tmp_path: Path):
    twice = [Correctness(id="0", turn=1, passage_id="p03", em=em, answer=None, searches=0) for em in (0, 1)]
    write_records(tmp_path / "twice.jsonl", twice)
    run(replace(config, correctness=str(tmp_path / "twice.jsonl")))
    (line,) = Path(config.out + ".errors.jsonl").read_text().splitlines()
    assert json.loads(line)["unit"] == "0/1"
    assert re.search(r"twice\.jsonl: query \('0', 1\): passage 'p03' occurs twice", json.loads(line)["error"])


def test_relevance_of_other_candidates_refuses_a_query_and_of_no_query_is_an_error(
    config: GroupsConfig, tmp_path: Path
):
    scored = list(read_records(config.relevance, Relevance))
    others = [replace(one, scores={"other": 90}) if one.id == "0" else one for one in scored]
    write_records(tmp_path / "one.jsonl", others)
    run(replace(config, relevance=str(tmp_path / "one.jsonl")))
    report = read_json(config.out + ".report.json")
    assert (report["dropped"]["refused"], report["read"]) == (1, 6)
    assert "0" not in [group.id for group in read_records(config.out, Group)] and report["kept"] > 0
    write_records(tmp_path / "all.jsonl", [Relevance(id=str(n), turn=1, scores={"other": 90}) for n in range(6)])
    with pytest.raises(RequestRefusedError, match=r"all of the 6 units were refused.*no relevance for passage 'p00'"):
        run(replace(config, relevance=str(tmp_path / "all.jsonl"), out=config.out + "2"))


def test_a_stage_that_writes_nothing_says_why(config: GroupsConfig, capsys):
    assert picked(replace(config, num_negatives=99)) == []
    assert "no record was written for 6 units (1 no_correct_candidate, 1 no_relevance" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="threshold=200: expected a relevance, 0 to 100"):
        run(replace(config, threshold=200))


def test_candidates_of_an_agent_with_another_protocol_are_not_continued(config: GroupsConfig):
    write_json(config.candidates + ".manifest.json", {"made_from": {"protocol": "compact"}})
    with pytest.raises(ConfigError, match=r"protocol=search_r1: .* made with protocol=compact.* give protocol=compact"):
        check_protocol("correctness", config.candidates, "search_r1")
    check_protocol("correctness", config.candidates, "compact")
    check_protocol("correctness", config.relevance, "search_r1")  # nothing says how it was made


def test_a_file_of_another_command_is_not_taken_for_correctness(config: GroupsConfig):
    write_json(config.correctness + ".manifest.json", {"made_from": {"candidates": "x", "scorer": "gold_documents"}})
    with pytest.raises(ConfigError, match=r"was written by another command.*--relevance and --correctness swapped"):
        run(config)


def test_missing_files_and_unknown_presets_are_named(config: GroupsConfig):
    with pytest.raises(
        ConfigError, match="no --correctness file; give one, or switch it off with --no-use-correctness"
    ):
        run(replace(config, correctness=""))
    with pytest.raises(ConfigError, match="preset='papre': expected one of opened, paper, released_code"):
        run(replace(config, preset="papre"))


def test_the_command_takes_flags_and_overrides_and_reports_errors_without_a_traceback(config: GroupsConfig, capsys):
    files = ["--candidates", config.candidates, "--relevance", config.relevance, "--correctness", config.correctness]
    assert main(["groups", *files, "--out", config.out, "--preset", "released_code", "num_negatives=7"]) == 0
    assert {len(group.negatives) for group in read_records(config.out, Group)} == {7}
    assert main(["groups", *files, "--out", config.out]) == 1
    error = capsys.readouterr().err
    assert "already exists" in error and "--resume" in error and "Traceback" not in error
    assert (
        main(["groups", *files, "--out", config.out, "--preset", "released_code", "num_negatives=7", "--resume"]) == 0
    )
    assert main(["groups", *files, "--out", config.out, "--seed", "4", "--resume"]) == 1
    assert "seed was 0, now 4" in capsys.readouterr().err


def test_what_was_opened_is_read_from_the_trajectories_without_correctness(config: GroupsConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"groups: no --trajectories file; give one$"):
        run(replace(config, preset="opened", correctness=""))
    shown = tuple(ScoredPassage(id=one, score=1.0) for one in PASSAGES[:3])
    base = Trajectory(
        id="", question="Q", golden_answers=("x",), answer=None, stop_reason=StopReason.MAX_TURNS, em=0, f1=0.0,
        text="",
        turns=(
            Turn(turn=1, reasoning="", query="q", passages=shown, opened=("p01",)),
            Turn(turn=2, reasoning="one two three", query="r", passages=()),
        ),
    )  # fmt: skip
    write_records(tmp_path / "t.jsonl", [replace(base, id=str(number)) for number in range(6)])
    made = replace(config, preset="opened", correctness="", trajectories=str(tmp_path / "t.jsonl"), out=f"{tmp_path}/o")
    run(made)
    found = [(group.id, group.positive, group.negatives, group.weight) for group in read_records(made.out, Group)]
    assert found == [(name, "p01", ("p00", "p02"), pytest.approx(8 / 54)) for name in ("2", "5")]


def test_correctness_in_order_of_likelihood_gives_the_tie_that_it_found(config: GroupsConfig, tmp_path: Path):
    """Query 1 has two tied candidates, of which only the second in retrieval order was rolled out."""
    path = tmp_path / "ordered.jsonl"
    write_records(path, [Correctness(id="1", turn=1, passage_id="p05", em=1, answer="x", searches=0)])
    made_from = {"exhaustive": False, "threshold": 60, "input relevance": file_fingerprint(config.relevance)}
    manifest = path.with_name(path.name + ".manifest.json")
    given = replace(config, correctness=str(path))
    write_json(manifest, {"made_from": made_from | {"preset": "paper", "order": "likelihood"}, "config": {}})
    assert picked(given) == [("1", "p05")]
    with pytest.raises(ConfigError, match="made with order=likelihood, which stops at the first correct one"):
        run(replace(given, preset="released_code", out=f"{tmp_path}/other"))
    with pytest.raises(ConfigError, match=r"stops at the first correct candidate of any relevance; set groups.use_rel"):
        write_json(manifest, {"made_from": made_from | {"exhaustive": True, "order": "likelihood"}, "config": {}})
        run(replace(given, out=f"{tmp_path}/other"))


def test_removed_settings_are_accepted_with_the_value_that_is_the_rule():
    given = {"candidates": "c", "out": "o", "drop_duplicate_queries": False, "drop_duplicate_passages": False}
    assert load_config(GroupsConfig, values=given) == GroupsConfig(candidates="c", out="o")
    with pytest.raises(ConfigError, match="'drop_duplicate_queries': this setting was removed and False is the rule"):
        load_config(GroupsConfig, values=given | {"drop_duplicate_queries": True})
