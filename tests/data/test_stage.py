"""The shell around a stage: output, report, resume, refusal, and what survives a kill."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.config import FREE
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.relevance import RelevanceConfig
from agentic_r_plugin.data.stages.runner import RunnerSpec
from agentic_r_plugin.data.stages.stage import Stage, for_workers, record_units, run_stage
from agentic_r_plugin.data.sub_answers import SubAnswersConfig
from agentic_r_plugin.data.trajectories import TrajectoriesConfig
from agentic_r_plugin.errors import JudgeError, ManifestMismatchError, OutputExistsError, RecordError
from agentic_r_plugin.records import Question, SubAnswer
from agentic_r_plugin.storage.claim import locked
from agentic_r_plugin.storage.table import UnitResult, WorkTable
from agentic_r_plugin.store import read_json, read_records, write_records

OPTIONS = {"max_model_len": 512, "tensor_parallel_size": 1}


@dataclass(frozen=True, kw_only=True)
class UpperConfig:
    in_: str = field(metadata=FREE)
    out: str = field(metadata=FREE)
    suffix: str = "!"
    max_error_share: float = field(default=0.25, metadata=FREE)
    runner: RunnerSpec = field(default_factory=RunnerSpec, metadata=FREE)
    llm: LLMSpec = field(default_factory=lambda: LLMSpec(backend="vllm", model="m", dtype="bfloat16", options=OPTIONS))
    search: SearchSpec = field(default_factory=lambda: SearchSpec(options={"nprobe": 8}))


@dataclass
class Shouter:
    """A stage that writes each question's id in capitals; drops those with `d`, fails on those with `e`."""

    config: UpperConfig
    fail: bool = True
    stop_after: int | None = None
    seen: list[str] = field(default_factory=list)
    opens: int = 0
    cost: Cost = field(default_factory=Cost)

    def work(self, batch: Sequence[Question]) -> list[UnitResult]:
        outcomes = []
        for question in batch:
            if self.stop_after is not None and len(self.seen) >= self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(question.id)
            self.cost.searches += 1
            if "d" in question.id:
                outcomes.append(UnitResult(dropped="has_d"))
            elif "e" in question.id and self.fail:
                outcomes.append(UnitResult(error="cannot spell e"))
            else:
                text = question.id.upper() + self.config.suffix
                outcomes.append(UnitResult(records=(SubAnswer(id=question.id, turn=1, query="q", sub_answer=text),)))
        return outcomes

    def fingerprints(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass

    def opened(self) -> Shouter:
        self.opens += 1
        return self

    def run(self, *, resume: bool = False, models: dict[str, str] | None = None, **runner: Any) -> dict:
        stage = Stage(
            name="shout",
            config=replace(self.config, runner=RunnerSpec(**runner)),
            inputs={"questions": Path(self.config.in_)},
            models=models or {},
            record=SubAnswer,
            units=lambda: record_units(self.config.in_, Question, attrgetter("id")),
            worker=self.opened,
            batch_size=3,
        )
        return run_stage(stage, resume=resume)


@pytest.fixture
def config(tmp_path: Path) -> UpperConfig:
    write_questions(tmp_path / "in.jsonl", list("abcdefgh"))
    return UpperConfig(in_=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out" / "o.jsonl"))


def write_questions(path: Path, ids: list[str]) -> None:
    write_records(path, [Question(id=identifier, question="Q", golden_answers=("x",)) for identifier in ids])


def files(config: UpperConfig) -> list[str]:
    return sorted(item.name for item in Path(config.out).parent.iterdir())


def test_a_stage_writes_records_in_input_order_and_a_report_of_all_units(config: UpperConfig):
    report = Shouter(config).run()
    assert [record.sub_answer for record in read_records(config.out, SubAnswer)] == ["A!", "B!", "C!", "F!", "G!", "H!"]
    assert {key: report[key] for key in ("read", "kept", "records", "dropped", "errors", "searches")} == {
        "read": 8, "kept": 6, "records": 6, "dropped": {"has_d": 1}, "errors": 1, "searches": 8,
    }  # fmt: skip
    assert read_json(config.out + ".report.json") == report
    assert Path(config.out + ".errors.jsonl").read_text() == '{"unit": "e", "error": "cannot spell e"}\n'
    assert files(config) == ["o.jsonl", "o.jsonl.errors.jsonl", "o.jsonl.manifest.json", "o.jsonl.report.json"]
    assert read_json(config.out + ".manifest.json")["config"]["suffix"] == "!"


def test_an_existing_output_is_refused_without_resume(config: UpperConfig):
    Shouter(config).run()
    with pytest.raises(OutputExistsError, match="--resume"):
        Shouter(config).run()


def test_a_finished_output_is_left_alone_by_resume(config: UpperConfig):
    first = Shouter(config).run()
    before = Path(config.out).stat().st_mtime_ns
    again = Shouter(config)
    assert again.run(resume=True) == first
    assert again.seen == [] and Path(config.out).stat().st_mtime_ns == before


def test_interrupted_work_goes_on_and_repeats_at_most_one_batch(config: UpperConfig, tmp_path: Path):
    first = Shouter(config, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not Path(config.out).exists()
    with pytest.raises(OutputExistsError, match=r"unfinished work exists"):
        Shouter(config).run()
    second = Shouter(config)
    report = second.run(resume=True)
    assert first.seen == list("abcde") and second.seen == list("defgh")
    assert report["searches"] == 3 + 5, "the cost of finished batches is kept, that of the lost batch is not known"
    whole = Shouter(replace(config, out=str(tmp_path / "whole.jsonl")))
    whole.run()
    assert Path(whole.config.out).read_bytes() == Path(config.out).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"suffix": "?"}}, r'suffix was "!", now "\?"'),
        ({"models": {"agent": "other"}}, 'fingerprint of agent was absent, now "other"'),
        ({"input": True}, "input questions was"),
        ({"config": {"llm": LLMSpec(backend="vllm", options=OPTIONS)}}, r'llm\.dtype was "bfloat16", now "auto"'),
        ({"config": {"llm": LLMSpec(dtype="bfloat16", options=OPTIONS)}}, 'backend was "vllm", now "hf"'),
        (
            {"config": {"llm": LLMSpec(backend="vllm", dtype="bfloat16", options={"quantization": "fp8"})}},
            r"llm\.options was .*512",
        ),
        (
            {"config": {"search": SearchSpec(options={"nprobe": 1})}},
            r'search\.options was {"nprobe": 8}, now {"nprobe": 1}',
        ),
    ],
)
def test_a_resume_with_something_else_is_refused_and_says_what_differs(config: UpperConfig, change: dict, message: str):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    if "input" in change:
        write_questions(Path(config.in_), list("abcdefghi"))
    with pytest.raises(ManifestMismatchError, match=message):
        Shouter(replace(config, **change.get("config", {}))).run(resume=True, models=change.get("models"))


def test_what_can_be_refused_without_the_models_is_so_before_they_are_loaded(config: UpperConfig):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    begun = Shouter(config)
    with pytest.raises(OutputExistsError):
        begun.run()
    other = Shouter(replace(config, suffix="?"))
    with pytest.raises(ManifestMismatchError):
        other.run(resume=True)
    assert begun.opens == other.opens == 0
    Shouter(config).run(resume=True)
    there = Shouter(config)
    with pytest.raises(OutputExistsError):
        there.run()
    assert there.opens == 0


ELSEWHERE = {
    "llm": LLMSpec(
        backend="vllm", model="moved", dtype="bfloat16", device="cuda", concurrency=3, max_batch_tokens=9,
        timeout_s=1.0, max_retries=1,
        url="http://elsewhere:1/v1", api_key_env="OTHER", prefix_cache_tokens=7,
        options={"max_model_len": 512, "tensor_parallel_size": 2},
    ),
    "search": SearchSpec(
        index="moved", url="http://elsewhere:2", device="cuda", batch_size=3, options={"nprobe": 8, "mapped": True}
    ),
}  # fmt: skip


def test_where_and_how_fast_a_model_runs_does_not_prevent_a_resume(config: UpperConfig):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    Shouter(replace(config, **ELSEWHERE)).run(resume=True)


def test_workers_of_a_cluster_that_runs_already_are_given_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("agent", "index", "served"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    given = TrajectoriesConfig(
        in_="q.jsonl", out="t.jsonl", llm=LLMSpec(model="agent"), search=SearchSpec(index="index", retriever="hub/name")
    )
    assert for_workers(given) == given
    far = replace(given, runner=RunnerSpec(kind="ray", address="auto"))
    made = for_workers(far)
    assert (made.llm.model, made.llm.tokenizer) == (str(tmp_path / "agent"), "")
    assert (made.search.index, made.search.retriever) == (str(tmp_path / "index"), "hub/name")
    asked = for_workers(replace(far, llm=LLMSpec(backend="openai", model="served", tokenizer="agent")))
    assert (asked.llm.model, asked.llm.tokenizer) == ("served", str(tmp_path / "agent"))
    mapped = for_workers(replace(far, search=SearchSpec(backend="bm25", options={"folder": "index", "k1": 0.9})))
    assert mapped.search.options == {"folder": str(tmp_path / "index"), "k1": 0.9}


def test_own_prompts_and_models_of_scorers_are_found_by_workers_of_a_cluster_that_runs_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("own.txt", "reranker"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    runner = RunnerSpec(kind="ray", address="auto")
    sub_answers = SubAnswersConfig(in_="t.jsonl", out="s.jsonl", prompt="own.txt", runner=runner)
    assert for_workers(sub_answers).prompt == str(tmp_path / "own.txt")
    assert for_workers(replace(sub_answers, prompt="")).prompt == ""
    relevance = RelevanceConfig(candidates="c.jsonl", out="r.jsonl", corpus="corpus.jsonl", runner=runner)
    judged = for_workers(replace(relevance, options={"prompt": "own.txt", "window": 10}))
    assert judged.options == {"prompt": str(tmp_path / "own.txt"), "window": 10}
    scored = for_workers(replace(relevance, options={"model": "reranker", "text": "query"}))
    assert scored.options == {"model": str(tmp_path / "reranker"), "text": "query"}


def test_moved_files_do_not_prevent_a_resume(config: UpperConfig, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    moved = Path(config.in_).rename(tmp_path / "moved.jsonl")
    Shouter(replace(config, in_=str(moved))).run(resume=True)
    assert Path(config.out).exists()


def test_an_output_of_unknown_origin_is_not_resumed(config: UpperConfig):
    Path(config.out).parent.mkdir()
    Path(config.out).write_text("mine\n")
    with pytest.raises(ManifestMismatchError, match="what it was made from is unknown"):
        Shouter(config).run(resume=True)
    assert Path(config.out).read_text() == "mine\n"


@pytest.mark.parametrize("missing", [[".report.json"], [".report.json", ""], []])
def test_a_kill_between_the_last_writes_is_made_good_by_resume(config: UpperConfig, missing: list[str]):
    work = Path(config.out + ".work")
    Shouter(config, fail=False).run()
    before = Path(config.out).read_bytes()
    with WorkTable(work) as kept:
        units = list(read_records(config.in_, Question))
        outcomes = Shouter(config, fail=False).work(units)
        kept.add([(at, unit.id, made) for at, (unit, made) in enumerate(zip(units, outcomes, strict=True))], {})
    for suffix in missing:
        Path(config.out + suffix).unlink()
    left = Path(config.out).parent / ".o.jsonl.abcd_123.tmp"
    left.write_text("half")
    again = Shouter(config, fail=False)
    again.run(resume=True)
    assert again.seen == [] and Path(config.out).read_bytes() == before
    assert not work.exists() and not left.exists()


def test_work_of_unknown_origin_is_not_resumed(config: UpperConfig):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    Path(config.out + ".manifest.json").unlink()
    with pytest.raises(ManifestMismatchError, match=r"o\.jsonl\.work is there without o\.jsonl\.manifest\.json"):
        Shouter(config).run(resume=True)


def test_too_many_judge_errors_end_the_stage_and_only_they_are_tried_again(config: UpperConfig):
    write_questions(Path(config.in_), ["a", "e1", "b", "e2"])
    with pytest.raises(JudgeError, match=r"failed on 2 of 4 units.*first, e1: cannot spell e.*--resume"):
        Shouter(config).run()
    assert not Path(config.out).exists()
    second = Shouter(config, fail=False)
    report = second.run(resume=True)
    assert second.seen == ["e1", "e2"] and report["errors"] == 0
    assert [record.id for record in read_records(config.out, SubAnswer)] == ["a", "e1", "b", "e2"]
    assert "o.jsonl.errors.jsonl" not in files(config)


def test_a_broken_input_line_is_found_before_any_work_and_leaves_nothing_behind(config: UpperConfig):
    with Path(config.in_).open("a") as stream:
        stream.write("{broken\n")
    stage = Shouter(config)
    with pytest.raises(RecordError, match=r"in\.jsonl:9"):
        stage.run()
    assert stage.seen == [] and stage.opens == 0 and files(config) == []


def test_a_unit_that_occurs_twice_is_an_error(config: UpperConfig):
    write_questions(Path(config.in_), ["a", "b", "a"])
    with pytest.raises(
        RecordError, match=r"in\.jsonl:3: 'a' occurs twice in the input of shout, first at .*in\.jsonl:1"
    ):
        Shouter(config).run()


def test_two_processes_cannot_work_on_one_output(config: UpperConfig):
    with pytest.raises(KeyboardInterrupt):
        Shouter(config, stop_after=4).run()
    second = Shouter(config)
    with locked(config.out), pytest.raises(OutputExistsError, match="another process is working on it"):
        second.run(resume=True)
    assert second.opens == 0
    second.run(resume=True)


def test_nobody_begins_an_output_while_our_models_are_loaded(config: UpperConfig):
    class Overtaken(Shouter):
        def opened(self) -> Shouter:
            with pytest.raises(OutputExistsError, match="another process is working on it"):
                Shouter(replace(self.config, suffix="?")).run()
            return super().opened()

    Overtaken(config).run()
    assert read_json(config.out + ".manifest.json")["config"]["suffix"] == "!"


def test_the_lock_of_a_killed_process_holds_nobody_up(config: UpperConfig):
    Path(config.out).parent.mkdir()
    Path(config.out + ".lock").touch()
    assert Shouter(config).run()["read"] == 8
    assert not Path(config.out + ".lock").exists()


def test_a_stage_without_units_writes_an_empty_output(config: UpperConfig):
    write_questions(Path(config.in_), [])
    report = Shouter(config).run()
    assert Path(config.out).read_bytes() == b"" and report["read"] == 0


_KILLED = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_stage import Shouter, UpperConfig

class Slow(Shouter):
    def work(self, batch):
        time.sleep(0.02)
        return super().work(batch)

Slow(UpperConfig(in_=sys.argv[1], out=sys.argv[2])).run(resume=True)
"""


def test_a_stage_killed_at_random_moments_ends_with_the_same_bytes(config: UpperConfig, tmp_path: Path):
    write_questions(Path(config.in_), [f"a{number:03}" for number in range(150)])
    whole = replace(config, out=str(tmp_path / "whole.jsonl"))
    Shouter(whole).run()
    command = [sys.executable, "-c", _KILLED, config.in_, config.out, str(Path(__file__).parent)]
    chance, work, sizes = random.Random(7), Path(config.out + ".work"), []
    for _ in range(2):
        before = work.stat().st_size if work.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (not work.exists() or work.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        if Path(config.out).exists():
            break
        sizes.append(work.stat().st_size)
    assert sizes and sizes == sorted(sizes) and sizes[0] > 0, "work went on from kill to kill"
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert Path(config.out).read_bytes() == Path(whole.out).read_bytes()
    report = json.loads(Path(config.out + ".report.json").read_text())
    assert report["read"] == report["kept"] == 150
    assert not work.exists()
