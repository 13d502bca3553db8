"""Where a stage runs does not change what it writes: parts, shards, threads, Ray actors, rounds of judge errors."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.config import FREE
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.stages.runner import RunnerSpec, WorkBatch, flow
from agentic_r_plugin.data.stages.stage import Stage, record_units, run_stage
from agentic_r_plugin.errors import BackendError, ConfigError, JudgeError, RecordError
from agentic_r_plugin.records import Question, SubAnswer
from agentic_r_plugin.storage.claim import Claim
from agentic_r_plugin.storage.table import UnitResult
from agentic_r_plugin.store import read_json, read_records, write_records


@dataclass(frozen=True, kw_only=True)
class EchoConfig:
    in_: str = field(metadata=FREE)
    out: str = field(metadata=FREE)
    max_error_share: float = field(default=0.1, metadata=FREE)
    runner: RunnerSpec = field(default_factory=RunnerSpec, metadata=FREE)


class Echo:
    """Says every question's id after its own time; fails as its behaviour file says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cost = folder, Cost()

    def fingerprints(self) -> dict[str, str]:
        with (self.folder / "fingerprinted.txt").open("a") as stream:
            stream.write(".")
        return {"echo": "1"}

    def work(self, batch: Sequence[Question]) -> list[UnitResult]:
        behaviour = json.loads((self.folder / "behaviour.json").read_text())
        with (self.folder / "asked.txt").open("a") as stream:
            stream.write("".join(f"{question.id}\n" for question in batch))
        time.sleep(random.Random(batch[0].id).uniform(0, 0.01))
        if {question.id for question in batch} & set(behaviour.get("die", [])):
            os._exit(1)
        if {question.id for question in batch} & set(behaviour.get("down", [])):
            raise BackendError("the server is down")
        self.cost.searches += len(batch)
        return [
            UnitResult(error="no reply")
            if question.id in behaviour.get("errors", [])
            else UnitResult(
                records=(SubAnswer(id=question.id, turn=1, query="q", sub_answer="é"),) * (len(question.id) % 3)
            )
            for question in batch
        ]

    def close(self) -> None:
        pass


IDS = [f"q{10 ** (number % 3)}x{number}" for number in range(100)]


def stage_of(folder: Path, name: str = "o.jsonl", *, share: float = 0.1, **runner: Any) -> Stage[Question]:
    config = EchoConfig(
        in_=str(folder / "in.jsonl"), out=str(folder / name), max_error_share=share, runner=RunnerSpec(**runner)
    )
    return Stage(
        name="echo",
        config=config,
        inputs={"questions": Path(config.in_)},
        record=SubAnswer,
        units=lambda: record_units(config.in_, Question, attrgetter("id")),
        worker=partial(Echo, folder),
        batch_size=7,
    )


def behave(folder: Path, **behaviour: list[str]) -> None:
    (folder / "behaviour.json").write_text(json.dumps(behaviour))


def asked(folder: Path) -> list[str]:
    """Ids asked since the last call."""
    file = folder / "asked.txt"
    found = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    behave(tmp_path)
    write_records(tmp_path / "in.jsonl", [Question(id=key, question="Q", golden_answers=("x",)) for key in IDS])
    return tmp_path


def lines(path: Path) -> bytes:
    return (
        b"".join(shard.read_bytes() for shard in sorted(path.glob("*.jsonl"))) if path.is_dir() else path.read_bytes()
    )


@pytest.mark.parametrize(
    "runner",
    [{"part_size": 10}, {"part_size": 1}, {"workers": 4, "part_size": 16}, {"sharded": True, "part_size": 30}],
    ids=str,
)
def test_parts_threads_and_shards_change_nothing(folder: Path, runner: dict):
    whole = run_stage(stage_of(folder, "whole.jsonl"), resume=False)
    report = run_stage(stage_of(folder, **runner), resume=False)
    assert lines(folder / "o.jsonl") == lines(folder / "whole.jsonl") != b""
    assert {key: report[key] for key in ("read", "kept", "records", "searches")} == {
        key: whole[key] for key in ("read", "kept", "records", "searches")
    }
    assert list(read_records(folder / "o.jsonl", SubAnswer)) == list(read_records(folder / "whole.jsonl", SubAnswer))
    assert not list(folder.glob("*.work*")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl.gz"])
def test_parts_become_any_format(folder: Path, name: str):
    run_stage(stage_of(folder, "whole.jsonl"), resume=False)
    run_stage(stage_of(folder, name, part_size=30), resume=False)
    assert list(read_records(folder / name, SubAnswer)) == list(read_records(folder / "whole.jsonl", SubAnswer))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_backend_that_fails_loses_only_the_batch_that_failed(folder: Path, workers: int):
    run_stage(stage_of(folder, "whole.jsonl"), resume=False)
    asked(folder)
    behave(folder, down=[IDS[60]])
    with pytest.raises(BackendError, match="the server is down"):
        run_stage(stage_of(folder, part_size=16, workers=workers), resume=False)
    first = asked(folder)
    behave(folder)
    run_stage(stage_of(folder, part_size=999), resume=True)
    again = set(asked(folder)) & set(first)
    assert IDS[60] in again and len(again) <= 7, "the other batches under way were waited for and kept"
    assert lines(folder / "o.jsonl") == lines(folder / "whole.jsonl")


def test_judge_errors_are_finished_work_unless_there_were_too_many(folder: Path):
    behave(folder, errors=[IDS[3], IDS[50]], down=[IDS[60]])
    with pytest.raises(BackendError):
        run_stage(stage_of(folder, part_size=16), resume=False)
    asked(folder)
    behave(folder, errors=[IDS[3], IDS[50], IDS[90]])
    report = run_stage(stage_of(folder, part_size=16), resume=True)
    assert report["errors"] == 3 and not {IDS[3], IDS[50]} & set(asked(folder))
    failed = [json.loads(line)["unit"] for line in (folder / "o.jsonl.errors.jsonl").read_text().splitlines()]
    assert failed == [IDS[3], IDS[50], IDS[90]]


@pytest.mark.parametrize("workers", [1, 3])
def test_too_many_judge_errors_stop_the_stage_early_and_only_they_are_asked_again(folder: Path, workers: int):
    run_stage(stage_of(folder, "whole.jsonl"), resume=False)
    asked(folder)
    bad = IDS[3:40:12]
    behave(folder, errors=bad)
    with pytest.raises(JudgeError, match=rf"failed on [34] of 100 units.*first, {IDS[3]}: no reply.*--resume"):
        run_stage(stage_of(folder, part_size=10, share=0.02, workers=workers), resume=False)
    first = asked(folder)
    assert len(first) < 60, "it did not go on to the end"
    behave(folder, errors=bad[:1])
    report = run_stage(stage_of(folder, part_size=10, share=0.02, workers=workers), resume=True)
    again = asked(folder)
    assert set(again) & set(first) == set(bad) & set(first) and report["errors"] == 1
    expected = [line for line in lines(folder / "whole.jsonl").splitlines() if f'"{IDS[3]}"'.encode() not in line]
    assert lines(folder / "o.jsonl").splitlines() == expected


def test_kept_units_that_were_damaged_are_an_error_that_names_them(folder: Path):
    behave(folder, down=[IDS[60]])
    with pytest.raises(BackendError):
        run_stage(stage_of(folder), resume=False)
    behave(folder)
    work = folder / "o.jsonl.work"
    work.write_bytes(work.read_bytes().replace("é".encode(), b"ee", 1))
    with pytest.raises(RecordError, match=r"o\.jsonl\.work: damaged: the checksum of unit 'q.*' is wrong; remove it"):
        run_stage(stage_of(folder), resume=True)
    work.write_bytes(b"no table" * 1000)
    with pytest.raises(RecordError, match=r"o\.jsonl\.work: damaged \(file is not a database\); remove it"):
        run_stage(stage_of(folder), resume=True)


def test_a_sharded_output_that_a_kill_left_without_a_report_is_written_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Claim, "finish", killed)
        run_stage(stage_of(folder, sharded=True, part_size=30), resume=False)
    asked(folder)
    report = run_stage(stage_of(folder, sharded=True, part_size=30), resume=True)
    assert asked(folder) == [] and report["records"] == 100
    assert sorted(path.name for path in (folder / "o.jsonl").iterdir()) == [f"0000{n}.jsonl" for n in range(4)]


def test_a_forecast_works_on_a_sample_and_writes_no_output(folder: Path, capsys: pytest.CaptureFixture):
    forecast = run_stage(stage_of(folder, forecast=20), resume=False)
    assert forecast["sample"] == 20 and forecast["expected"]["searches"] == 100
    assert len(asked(folder)) == 20 and not (folder / "o.jsonl").exists()
    assert read_json(folder / "o.jsonl.forecast.json") == forecast
    assert "echo: forecast for 100 units from 20 of them" in capsys.readouterr().out
    run_stage(stage_of(folder), resume=False)


def test_no_more_batches_are_taken_than_may_be_under_way():
    taken: list[int] = []
    running: list[int] = []

    def batches() -> Iterator[WorkBatch[int]]:
        for number in range(20):
            taken.append(number)
            yield WorkBatch((number,), (str(number),), (number,))

    def submit(batch: WorkBatch[int]) -> int:
        running.append(batch.tasks[0])
        return batch.tasks[0]

    def first_done(handles: Sequence[int]) -> int:
        assert len(handles) <= 3 and len(taken) - len(done) <= 3
        return max(handles)

    done: list[int] = []
    for batch, _ in flow(batches(), 3, submit, first_done, lambda handle: ([], {})):
        done.append(batch.tasks[0])
    assert sorted(done) == list(range(20)) and done[0] == 2


def test_after_an_error_those_under_way_are_finished_and_the_first_error_is_raised():
    def result(handle: int) -> Any:
        if handle in (3, 5):
            raise BackendError(f"batch {handle}")
        return [], {}

    batches = iter([WorkBatch((number,), (str(number),), (number,)) for number in range(20)])
    done: list[int] = []
    with pytest.raises(BackendError, match="batch 3"):
        for batch, _ in flow(batches, 4, lambda batch: batch.tasks[0], min, result):
            done.append(batch.tasks[0])
    assert done == [0, 1, 2, 4, 6] and next(batches).tasks == (7,)


def test_an_error_while_a_batch_is_prepared_leaves_those_under_way_their_end():
    def batches() -> Iterator[WorkBatch[int]]:
        yield from (WorkBatch((number,), (str(number),), (number,)) for number in range(3))
        raise RecordError("the corpus does not hold a candidate")

    done: list[int] = []
    with pytest.raises(RecordError, match="does not hold"):
        for batch, _ in flow(batches(), 8, lambda batch: batch.tasks[0], max, lambda handle: ([], {})):
            done.append(batch.tasks[0])
    assert done == [2, 1, 0]


@pytest.mark.parametrize(("runner", "message"), [({"kind": "spark"}, "local, ray"), ({"workers": 0}, "at least 1")])
def test_impossible_runners_are_refused(runner: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        RunnerSpec(**runner)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_actors_write_the_same_and_go_on_after_a_failure(folder: Path):
    run_stage(stage_of(folder, "whole.jsonl"), resume=False)
    asked(folder)
    (folder / "fingerprinted.txt").unlink()
    behave(folder, down=[IDS[60]])
    ray_runner = {"kind": "ray", "workers": 2, "cpus_per_worker": 0.5, "part_size": 16}
    with pytest.raises(BackendError, match="the server is down"):
        run_stage(stage_of(folder, **ray_runner), resume=False)
    first = asked(folder)
    behave(folder)
    report = run_stage(stage_of(folder, **ray_runner), resume=True)
    assert len(set(asked(folder)) & set(first)) <= 7, "the other batches under way were waited for and kept"
    assert lines(folder / "o.jsonl") == lines(folder / "whole.jsonl") and report["searches"] == 100
    assert (folder / "fingerprinted.txt").read_text() == ".."  # one of the two workers of this machine, in each run


@pytest.mark.usefixtures("cluster")
def test_a_ray_worker_that_keeps_dying_is_an_error_and_a_cluster_too_small_too(folder: Path):
    behave(folder, die=[IDS[20]])
    with pytest.raises(BackendError, match=r"\(runner\.max_restarts=1\) died: "):
        run_stage(stage_of(folder, kind="ray", cpus_per_worker=0.5, max_restarts=1), resume=False)
    with pytest.raises(ConfigError, match=r"1 workers want 64 CPU in all, the Ray cluster has 2; lower"):
        run_stage(stage_of(folder, "p.jsonl", kind="ray", cpus_per_worker=64), resume=False)
