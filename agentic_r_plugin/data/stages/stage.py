"""The shell around a data stage: files, progress, resume and the report. The stage itself is a function on records.

A stage works on units (a question, a query), each identified by its position in the input. Finished units are stored
in a table (`storage.table`) batch by batch, so a killed process loses at most the batches in flight. At the end the
table is written to OUT in input order. OUT therefore does not depend on interruptions or on the order in which workers
finish, and memory does not grow with the input.

| next to OUT | holds |
|---|---|
| `OUT.manifest.json` | configuration and fingerprints of inputs and models; a resume with others is refused |
| `OUT.work` | finished units; removed at the end |
| `OUT.errors.jsonl` | units that were refused or whose judge failed, if any |
| `OUT.report.json` | counts of read, kept and dropped units, and the cost; written last, so its existence means done |
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from agentic_r_plugin import cost
from agentic_r_plugin.backends import LLMSpec, SearchSpec, with_absolute_paths
from agentic_r_plugin.config import deciding, to_dict
from agentic_r_plugin.data.stages.runner import Executor, RunnerSpec, StageWorker, WorkBatch, open_executor
from agentic_r_plugin.errors import ConfigError, JudgeError, RecordError, RequestRefusedError
from agentic_r_plugin.progress import progress
from agentic_r_plugin.records import Record
from agentic_r_plugin.storage.claim import Output, companion
from agentic_r_plugin.storage.lookup import HashIndex, KeyedRecords, key_hash
from agentic_r_plugin.storage.table import Row, UnitResult, WorkTable
from agentic_r_plugin.store import (
    PACKINGS,
    RecordType,
    atomic_path,
    check_suffix,
    dump_line,
    file_fingerprint,
    parse_line,
    placed_records,
    remove_temporaries,
    write_json,
    write_records,
)

Item = TypeVar("Item")
Config = TypeVar("Config", bound=Any)


@dataclass(frozen=True)
class Unit(Generic[Item]):
    """What a stage works on at a time, with its key and, if it is known, its place in the input."""

    key: str
    item: Item
    file: Path | None = None
    line: int | None = None
    """From 1; in a Parquet file, the row."""


def record_units(
    path: str | Path, cls: type[RecordType], key: Callable[[RecordType], str]
) -> Iterator[Unit[RecordType]]:
    """The records of a file as units.

    Raises:
        RecordError: as `store.read_records`.
    """
    return (Unit(key(record), record, file, line) for file, line, record in placed_records(path, cls))


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Item]):
    """One run of a stage.

    Args:
        name: name of the command.
        config: its configuration, with `out` (a file, or a folder of shards) and `runner`; settings that can change
            the result (`config.deciding`) are compared on resume.
        inputs: input files, by role.
        models: fingerprints of the caller's own resources, by role; the workers add theirs.
        record: type of the records written.
        units: reads the input from its start, each key once.
        prepare: item -> task of a worker; a unit for which it raises RecordError is refused.
        sides: files in which `prepare` looks records up; read once before any work, closed at the end.
        worker: builds a worker (from `for_workers(config)`); must be picklable if `runner` uses Ray.
        batch_size: units per batch; a killed process loses the batches in flight.
    """

    name: str
    config: Any
    inputs: dict[str, Path]
    units: Callable[[], Iterable[Unit[Item]]]
    worker: Callable[[], StageWorker]
    batch_size: int
    record: type[Record]
    prepare: Callable[[Item], Any] = lambda item: item
    sides: Sequence[KeyedRecords[Any]] = ()
    models: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The output file or folder."""
        return Path(self.config.out)

    @property
    def runner(self) -> RunnerSpec:
        """Where the work runs."""
        found: RunnerSpec = self.config.runner
        return found

    @property
    def max_error_share(self) -> float:
        """The stage fails if the judge fails on more than this share of the units."""
        return float(getattr(self.config, "max_error_share", 0.1))


def for_workers(config: Config) -> Config:
    """The configuration for the workers: its paths are made absolute if workers run in other folders.

    A relative path of the caller means nothing to an actor of an existing Ray cluster.
    """
    return with_absolute_paths(config) if config.runner.elsewhere else config


def run_stage(stage: Stage[Item], *, resume: bool) -> dict[str, Any]:
    """Run a stage to its end, or continue an interrupted run; returns the report.

    With `runner.forecast` only a sample is processed, and the forecast is returned (`OUT.forecast.json`).

    Raises:
        OutputExistsError: the output, or unfinished work on it, exists and `resume` is off; or another process is
            working on it.
        ManifestMismatchError: resumed with another configuration, input or model than the run was started with.
        RecordError: the input holds a broken record or a unit twice, or the stored work is damaged.
        JudgeError: too large a share of the units failed; a resume retries them.
        RequestRefusedError: every unit was refused; a resume retries them.
        BackendError, SearchError: a model or a retriever failed after its retries; finished units are kept.
        ConfigError: a batch of no unit, which would give an empty output.
    """
    if stage.batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {stage.batch_size}")
    with ExitStack() as stack:
        for side in stage.sides:
            stack.callback(side.close)
        # A forecast stores no units, so it claims no output.
        if stage.runner.forecast:
            total = _check_input(stage)
            return _forecast(stage, total, _opened(stage, stack))
        output = Output(out=stage.out, made_from=_made_from(stage), done=".report.json", late=(_MODEL,))
        held = stack.enter_context(output.claim(resume=resume))
        total = 0 if held.finished else _check_input(stage)
        # Loading models is slow, so everything that can be refused without them has been checked by now.
        executor = _opened(stage, stack)
        # For a finished output, too: its models are compared.
        held.begin(_models(executor.fingerprints()), stage=stage.name, config=to_dict(stage.config))
        if held.finished is None:
            with WorkTable(held.work) as table:
                _work(stage, table, total, executor)
                held.finish(_finish(stage, table, total))
        # After the report: if a kill comes in between, the next resume removes the table.
        WorkTable.remove(held.work)
        _remove_leftovers(held.out)
        assert held.finished is not None
        return held.finished


def _opened(stage: Stage[Any], stack: ExitStack) -> Executor:
    executor = open_executor(stage.worker, stage.runner)
    stack.callback(executor.close)
    return executor


# --- What determines the output --------------------------------------------------------------------------------------


def _made_from(stage: Stage[Any]) -> dict[str, Any]:
    """Everything that determines the output and is known before the workers load their models."""
    inputs = {f"input {role}": file_fingerprint(path) for role, path in stage.inputs.items()}
    return _recorded(stage.config) | inputs | _models(stage.models)


_MODEL = "fingerprint of "


def _models(fingerprints: dict[str, str]) -> dict[str, str]:
    return {f"{_MODEL}{role}": value for role, value in sorted(fingerprints.items())}


def _recorded(config: Any) -> dict[str, Any]:
    """Settings that can change the records; settings of a backend appear under their own names."""
    found: dict[str, Any] = {}
    for name, value in deciding(config).items():
        is_backend = isinstance(getattr(config, name, None), LLMSpec | SearchSpec)  # none: a removed setting
        found |= {f"{name}.{key}": setting for key, setting in value.items()} if is_backend else {name: value}
    return found


# --- Work -------------------------------------------------------------------------------------------------------------


def _check_input(stage: Stage[Any]) -> int:
    """Read all inputs once, so that a broken line is found before any expensive work; returns the number of units."""
    check_suffix(stage.out)
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    for side in stage.sides:
        side.open()
    index, total = HashIndex(stage.out.parent), 0
    try:
        for total, unit in enumerate(stage.units(), start=1):
            index.add(key_hash(unit.key), total)
        # Hashes are stored on disk, not keys in memory. They can collide, so the keys of repeated ones are compared.
        if repeated := set(index.finish()):
            _refuse_twice(stage, repeated)
        return total
    finally:
        index.close()


def _refuse_twice(stage: Stage[Any], repeated: Set[int]) -> None:
    """Raise RecordError if a key occurs twice, and not only its hash."""
    seen: dict[str, Unit[Any]] = {}
    # A second pass over the input, in which only units with a repeated hash are held.
    for unit in stage.units():
        if (first := seen.get(unit.key)) is not None:
            at = f", first at {first.file}:{first.line}" if first.file is not None else ""
            raise RecordError(
                f"{unit.key!r} occurs twice in the input of {stage.name}{at}; every unit must occur once",
                path=unit.file,
                line=unit.line,
            )
        if key_hash(unit.key) in repeated:
            seen[unit.key] = unit


def _work(stage: Stage[Any], table: WorkTable, total: int, executor: Executor) -> None:
    """Process all unfinished units."""
    done = table.finished(total)
    _check_errors(stage, table, total)
    with progress(total=total, initial=sum(done), desc=stage.name, unit="unit") as shown:
        # Start no further batch once the share of errors is certain to be too large.
        batches = takewhile(lambda _: not _too_many_errors(stage, table, total), _batches(stage, table, done, shown))
        for batch, (outcomes, spent) in executor.run(batches):
            table.add(list(zip(batch.positions, batch.keys, outcomes, strict=True)), spent)
            shown.update(len(outcomes))
    _check_errors(stage, table, total)
    _check_refused(stage, table, total)


def _batches(stage: Stage[Any], table: WorkTable, done: bytearray, shown: Any) -> Iterator[WorkBatch[Any]]:
    """Batches of unfinished units, in input order; units that cannot be prepared are stored as refused."""
    left = (unit for unit in enumerate(stage.units()) if not done[unit[0]])
    while units := list(islice(left, stage.batch_size)):
        ready, refused = _prepared(stage, units)
        if refused:
            table.add(refused, {})
            shown.update(len(refused))
        if ready:
            yield WorkBatch(*zip(*ready, strict=True))


def _prepared(
    stage: Stage[Item], units: Iterable[tuple[int, Unit[Item]]]
) -> tuple[list[tuple[int, str, Any]], list[tuple[int, str, UnitResult]]]:
    """Units with their tasks, and units that do not fit the other inputs, such as a candidate that the corpus lacks."""
    ready: list[tuple[int, str, Any]] = []
    refused: list[tuple[int, str, UnitResult]] = []
    for position, unit in units:
        try:
            ready.append((position, unit.key, stage.prepare(unit.item)))
        except RecordError as error:
            refused.append((position, unit.key, UnitResult.refused(error)))
    return ready, refused


def _too_many_errors(stage: Stage[Any], table: WorkTable, total: int) -> bool:
    return table.num_errors > stage.max_error_share * total


def _check_errors(stage: Stage[Any], table: WorkTable, total: int) -> None:
    """Raise JudgeError if too many units failed."""
    if _too_many_errors(stage, table, total):
        errors, first = table.num_errors, table.first_error()
        # A new round makes a resume retry the failed units instead of failing again at once.
        table.next_round()
        raise JudgeError(
            f"{stage.name}: the judge failed on {errors} of {total} units, more than "
            f"max_error_share={stage.max_error_share}; first, {first}. --resume tries these again"
        )


def _check_refused(stage: Stage[Any], table: WorkTable, total: int) -> None:
    """Raise if every unit was refused: this points to a wrong setting rather than to unusual units."""
    if not table.num_refused or table.num_refused + table.num_errors < total:
        return
    first = table.first_error()
    table.next_round()
    raise RequestRefusedError(
        f"{stage.name}: all of the {total} units were refused, none could be worked on; first, {first}. "
        "--resume tries these again"
    )


def _forecast(stage: Stage[Any], total: int, executor: Executor) -> dict[str, Any]:
    """Process units spread over the input, store no results, and forecast the cost of all units."""
    # Evenly spaced units: inputs are often sorted by data set, so the first units would not be representative.
    wanted = min(stage.runner.forecast, total)
    picked = {index * total // wanted for index in range(wanted)} if wanted else set()
    ready, refused = _prepared(stage, (unit for unit in enumerate(stage.units()) if unit[0] in picked))
    if refused and not ready:
        raise RequestRefusedError(f"{stage.name}: all units of the sample were refused; first, {refused[0][2].error}")
    # At least 8 batches if possible, since the standard error is estimated between batches.
    size = max(1, min(stage.batch_size, len(ready) // 8))
    batches = [WorkBatch(*zip(*ready[start : start + size], strict=True)) for start in range(0, len(ready), size)]
    spent = [(len(batch.tasks), paid) for batch, (_, paid) in executor.run(iter(batches))]
    forecast = {"stage": stage.name, **cost.forecast(spent, total)}
    write_json(companion(stage.out, ".forecast.json"), forecast)
    print(cost.forecast_table(forecast))
    return forecast


# --- The end ----------------------------------------------------------------------------------------------------------


def _finish(stage: Stage[Any], table: WorkTable, total: int) -> dict[str, Any]:
    """Write OUT from the table; returns the report."""
    kept = records = 0
    dropped: Counter[str] = Counter()
    errors_file = companion(stage.out, ".errors.jsonl")
    _remove_leftovers(stage.out)
    with atomic_path(errors_file) as temporary, temporary.open("wb") as errors:
        # Counts and errors are collected while the records are written, so the table is read once.
        def counted(first: int, last: int) -> Iterator[Row]:
            nonlocal kept, records
            for row in table.rows(first, last):
                kept += row.count > 0
                records += row.count
                if row.dropped is not None:
                    dropped[row.dropped] += 1
                if row.error is not None:
                    errors.write(dump_line({"unit": row.key, "error": row.error}))
                yield row

        if stage.runner.sharded:
            _write_shards(stage, counted, total)
        else:
            _write(stage.out, stage.record, counted(0, total))
    # The file was written in any case, since errors are known only after the table was read.
    kinds = {"refused": table.num_refused, "judge errors": table.num_errors}
    failed = {kind: count for kind, count in kinds.items() if count}
    if (first := table.first_error()) is None:
        errors_file.unlink()
    else:
        counts = " and ".join(f"{count} {kind}" for kind, count in failed.items())
        print(f"{stage.name}: of {total} units {counts}, kept apart in {errors_file}; first, {first}", file=sys.stderr)
    if not records:
        reasons = sorted((dict(dropped) | failed).items())
        why = ", ".join(f"{count} {reason}" for reason, count in reasons) or "the input is empty"
        print(f"{stage.name}: no record was written for {total} units ({why})", file=sys.stderr)
    return {
        "stage": stage.name,
        "read": total,
        "kept": kept,
        "records": records,
        "dropped": dict(sorted(dropped.items())),
        "errors": table.num_errors,
        **cost.summary(table.cost, total),
    }


def _write(path: Path, record: type[Record], rows: Iterable[Row]) -> None:
    if path.suffix in (*PACKINGS, ".parquet"):
        lines = (line for row in rows for line in row.records.splitlines())
        write_records(path, (record.from_dict(parse_line(line, path, 0)) for line in lines))
        return
    # Stored records are JSON lines already and need no parsing.
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for row in rows:
            stream.write(row.records)


def _write_shards(stage: Stage[Any], rows: Callable[[int, int], Iterator[Row]], total: int) -> None:
    """Write a folder of files of `part_size` units each; the folder is renamed to OUT when it is complete."""
    folder, size = _shards(stage.out), stage.runner.part_size
    folder.mkdir()
    # Without units there is still one empty shard: a folder without shards is not read as records.
    for number in range(max(1, -(-total // size))):
        _write(folder / f"{number:05d}.jsonl", stage.record, rows(number * size, min(total, (number + 1) * size)))
    if stage.out.exists():  # complete, but the process was killed before the report
        shutil.rmtree(stage.out)
    folder.replace(stage.out)


def _shards(out: Path) -> Path:
    """Temporary folder of the shards, before it is renamed to OUT."""
    return out.with_name(f".{out.name}.shards.tmp")


def _remove_leftovers(out: Path) -> None:
    """Remove temporary files of a process that was killed while it wrote OUT or a file next to it."""
    for suffix in ("", ".errors.jsonl", ".manifest.json", ".report.json"):
        remove_temporaries(companion(out, suffix))
    shutil.rmtree(_shards(out), ignore_errors=True)
