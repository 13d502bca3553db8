"""The shell around a data stage: files, progress, resume and the report. The stage itself is a function on records.

A stage works on units (a question, a query), each known by its position in the input. Finished units are appended to
`OUT.journal`, one line each with its checksum, and synced after every batch; a process that is killed loses at most the
batches under way. Every `part_size` units the journal is compacted into a part, in input order, so memory does not grow
with the input; at the end the parts become OUT, which therefore does not depend on interruptions or on the order in
which workers finish. `OUT.report.json` is written last: its existence means done.

| beside OUT | holds |
|---|---|
| `OUT.manifest.json` | configuration and fingerprints of inputs and models; a resume with others is refused |
| `OUT.journal` | units of the parts in work; removed at the end |
| `OUT.parts/` | finished parts and their checksums; they become OUT at the end |
| `OUT.errors.jsonl` | units whose judge failed and units that were refused, when there are any |
| `OUT.report.json` | counts of read, kept and dropped, and the cost |
"""

from __future__ import annotations

import dataclasses
import glob
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

from agentic_r_plugin import __version__
from agentic_r_plugin.backends import LLMSpec, SearchSpec, absolute_options, with_absolute_paths
from agentic_r_plugin.config import deciding, to_dict
from agentic_r_plugin.data import cost
from agentic_r_plugin.data.journal import REFUSED, Journal, require_free
from agentic_r_plugin.data.keyed import HashIndex, KeyedRecords, key_hash
from agentic_r_plugin.data.parts import Parts
from agentic_r_plugin.data.runner import Batch, Executor, RunnerSpec, Worker, open_executor
from agentic_r_plugin.errors import (
    JudgeError,
    ManifestMismatchError,
    OutputExistsError,
    RecordError,
    RequestRefusedError,
)
from agentic_r_plugin.records import Record
from agentic_r_plugin.store import (
    absolute,
    atomic_path,
    dump_line,
    file_fingerprint,
    read_json,
    read_records,
    require_absent,
    write_json,
    write_records,
)

Item = TypeVar("Item")
Config = TypeVar("Config", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Item]):
    """One run of a stage.

    Args:
        name: the command.
        config: its configuration; what decides the result (`config.deciding`) is compared on resume.
        out: output file, or folder of shards (`runner.sharded`).
        inputs: files that are read, by role.
        models: fingerprints of what the caller uses, by role; the workers add theirs.
        record: type of the records written.
        units: reads the input from its start: (key, item), each key once.
        prepare: item -> what a worker is given of it.
        sides: files that `prepare` looks things up in; read once before any work, closed at the end.
        worker: builds a worker (from `for_workers(config)`); picklable where `runner` is Ray.
        batch_size: units a batch; so many times the batches under way are lost when the process is killed.
        runner: where the work is done.
        max_error_share: more judge errors than this share of the units end the stage with an error.
    """

    name: str
    config: Any
    out: Path
    inputs: dict[str, Path]
    units: Callable[[], Iterable[tuple[str, Item]]]
    worker: Callable[[], Worker[Any]]
    batch_size: int
    record: type[Record]
    prepare: Callable[[Item], Any] = lambda item: item
    sides: Sequence[KeyedRecords[Any]] = ()
    models: dict[str, str] = field(default_factory=dict)
    runner: RunnerSpec = field(default_factory=RunnerSpec)
    max_error_share: float = 0.1

    def beside(self, suffix: str) -> Path:
        """A file that belongs to OUT."""
        return self.out.with_name(self.out.name + suffix)


def for_workers(config: Config) -> Config:
    """The configuration that workers are built from: where they are in other folders, the paths they open are absolute.

    A relative path of the caller's means nothing to an actor of a Ray cluster that runs already.
    """
    if not config.runner.elsewhere:
        return config
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    made: dict[str, Any] = {
        name: with_absolute_paths(value) for name, value in values.items() if isinstance(value, LLMSpec | SearchSpec)
    }
    if "prompt" in values:
        made["prompt"] = absolute(values["prompt"])
    if "options" in values:
        made["options"] = absolute_options(values["options"])
    return dataclasses.replace(config, **made)


def run_stage(stage: Stage[Item], *, resume: bool) -> dict[str, Any]:
    """Run a stage to its end, or go on where it stopped; returns the report.

    With `runner.forecast` only a sample is worked on, and the forecast is returned (`OUT.forecast.json`).

    Raises:
        OutputExistsError: the output, or work on it, is there and `resume` was not asked for; or another process
            works on it.
        ManifestMismatchError: resumed with another configuration, input or model than it was begun with.
        RecordError: the input holds a broken record or one unit twice, or the journal is damaged.
        JudgeError: too large a share of the units failed; they are tried again by a resume.
        RequestRefusedError: every unit was refused; they are tried again by a resume.
        BackendError, SearchError: a model or a retriever failed after its retries; what is finished stays.
    """
    with ExitStack() as stack:
        for side in stage.sides:
            stack.callback(side.close)
        if stage.runner.forecast:
            total = _check_input(stage)
            return _forecast(stage, total, _opened(stage, stack))
        _check_output(stage, resume=resume)
        manifest = _manifest(stage)
        finished = resume and stage.out.exists() and stage.beside(".report.json").exists()
        if resume:
            _check_same(stage, manifest, loaded=False)
        total = 0 if finished else _check_input(stage)
        executor = _opened(stage, stack)  # loads the models: what can be refused without them has been
        manifest["made_from"] |= _models(stage.models | executor.fingerprints())
        if finished:
            _check_same(stage, manifest, loaded=True)
            _clean_up(stage)
            return dict(read_json(stage.beside(".report.json")))
        with Journal(stage.beside(".journal")) as journal:
            manifest = _begin(stage, manifest, journal, resume=resume)
            parts = Parts(_parts_folder(stage), manifest["part_size"])
            _Work(stage, journal, parts, total).run(executor)
            _remove_leavings(stage.out)
            report = _finish(stage, journal, parts, total)
            write_json(stage.beside(".report.json"), report)
            _clean_up(stage)
    return report


def _opened(stage: Stage[Any], stack: ExitStack) -> Executor:
    executor = open_executor(stage.worker, stage.runner)
    stack.callback(executor.close)
    return executor


# --- Manifest ---------------------------------------------------------------------------------------------------------


def _manifest(stage: Stage[Any]) -> dict[str, Any]:
    """What is known before the workers have loaded their models."""
    return {
        "stage": stage.name,
        "version": __version__,
        "part_size": stage.runner.part_size,
        "made_from": _recorded(stage.config)
        | {f"input {role}": file_fingerprint(path) for role, path in stage.inputs.items()}
        | _models(stage.models),
        "config": to_dict(stage.config),
    }


_MODEL = "fingerprint of "


def _models(fingerprints: dict[str, str]) -> dict[str, str]:
    return {f"{_MODEL}{role}": value for role, value in sorted(fingerprints.items())}


def _recorded(config: Any) -> dict[str, Any]:
    """The settings that decide what the records are; of a backend each setting under its own name."""
    found: dict[str, Any] = {}
    for name, value in deciding(config).items():
        is_backend = isinstance(getattr(config, name), LLMSpec | SearchSpec)
        found |= {f"{name}.{key}": setting for key, setting in value.items()} if is_backend else {name: value}
    return found


def _check_output(stage: Stage[Any], *, resume: bool) -> None:
    """Refuses to touch what is not ours to go on with, or what another process works on."""
    manifest_path = stage.beside(".manifest.json")
    if not resume:
        require_absent(stage.out)
        for path in (stage.beside(".journal"), stage.beside(".parts")):
            if path.exists():
                raise OutputExistsError(
                    f"{path}: work on {stage.out} was begun; --resume goes on with it, or remove it"
                )
    elif not manifest_path.exists():
        for path in (stage.out, stage.beside(".journal"), stage.beside(".parts")):
            if path.exists() and (path.is_dir() or path.stat().st_size):  # the journal is there before the manifest
                raise ManifestMismatchError(
                    f"{path} is there without {manifest_path.name}: what it was made from is unknown; "
                    "remove it or choose another path"
                )
    require_free(stage.beside(".journal"))


def _check_same(stage: Stage[Any], manifest: dict[str, Any], *, loaded: bool) -> None:
    """Refuses to go on with what was begun from something else; before they are `loaded`, models are left out."""
    path = stage.beside(".manifest.json")
    if not path.exists():
        return
    before, now = read_json(path).get("made_from", {}), json.loads(json.dumps(manifest["made_from"]))
    changed = [
        f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and (loaded or not key.startswith(_MODEL))
    ]
    if changed:
        raise ManifestMismatchError(
            f"{stage.out}: cannot go on with what was begun from something else: {'; '.join(changed)}. "
            "Give the same inputs, or another --out"
        )


def _begin(stage: Stage[Any], manifest: dict[str, Any], journal: Journal, *, resume: bool) -> dict[str, Any]:
    """Write the manifest, once the journal is ours; work that was begun keeps its size of parts.

    Raises:
        OutputExistsError, ManifestMismatchError: another process began, or ended, while our models were loaded.
    """
    if resume:
        _check_same(stage, manifest, loaded=True)
    else:
        require_absent(stage.out)
        if journal.positions or stage.beside(".parts").exists():
            raise OutputExistsError(f"{stage.out}: another process has begun it meanwhile; --resume goes on with it")
    path = stage.beside(".manifest.json")
    if path.exists():
        manifest |= {"part_size": read_json(path).get("part_size", manifest["part_size"])}
    write_json(path, manifest)
    return manifest


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- Work -------------------------------------------------------------------------------------------------------------


def _check_input(stage: Stage[Any]) -> int:
    """Read all inputs once, so that a broken line is found before anything expensive is done; the number of units."""
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    for side in stage.sides:
        side.open()
    index = HashIndex(stage.out.parent)
    try:
        for position, (key, _) in enumerate(stage.units()):
            index.add(key_hash(key), position)
        if repeated := set(index.finish()):
            seen: set[str] = set()
            for key, _ in stage.units():
                if key in seen:
                    raise RecordError(f"{key!r} occurs twice in the input of {stage.name}; every unit must occur once")
                if key_hash(key) in repeated:
                    seen.add(key)
        return len(index)
    finally:
        index.close()


class _Work:
    """Feeds the executor with what is not done, journals what comes back, closes parts."""

    def __init__(self, stage: Stage[Any], journal: Journal, parts: Parts, total: int) -> None:
        self.stage, self.journal, self.parts, self.total = stage, journal, parts, total
        self._under_way: Counter[int] = Counter()
        self._handed_out: set[int] = set()
        leftovers = [p for p in journal.positions if self._stands(parts.number(p))]
        if leftovers:
            journal.forget(leftovers)

    def _stands(self, part: int) -> bool:
        """Whether a part is closed and has nothing to be asked again."""
        return self.parts.closed(part) and not self.parts.error_of_earlier_round(part, self.journal.round)

    def run(self, executor: Executor) -> None:
        """Work everything off."""
        from tqdm import tqdm

        with tqdm(total=self.total, desc=self.stage.name, unit="unit", disable=None) as progress:
            self._check_errors()
            batches = takewhile(lambda _: not self._too_many_errors(), self._batches(progress))
            for batch, (outcomes, spent) in executor.run(batches):
                self.journal.append(list(zip(batch.positions, batch.keys, outcomes, strict=True)), spent)
                progress.update(len(outcomes))
                for position in batch.positions:
                    self._under_way[self.parts.number(position)] -= 1
                self._close_parts()
            self._check_errors()
            self._check_refused()
            self._close_parts()
        if not self.total:
            self.parts.close(0, 0, self.journal.read)

    def _batches(self, progress: Any) -> Iterator[Batch[Any] | None]:
        """What is not done, in input order; at most two parts are in work."""
        ready: list[tuple[int, str, Any]] = []
        current = -1
        for position, (key, item) in enumerate(self.stage.units()):
            part = self.parts.number(position)
            if part != current:
                if current >= 0 and not self._stands(current):
                    self._handed_out.add(current)
                    self._close_parts()
                current = part
                if len(self._handed_out) > 1 and ready:
                    yield self._batch(ready)
                while len(self._handed_out) > 1:
                    yield None
                    self._close_parts()
            if self._stands(part) or self.journal.done(position) or self.parts.done(position, self.journal.round):
                progress.update(1)
                continue
            ready.append((position, key, self.stage.prepare(item)))
            self._under_way[part] += 1
            if len(ready) == self.stage.batch_size:
                yield self._batch(ready)
        if current >= 0 and not self._stands(current):
            self._handed_out.add(current)
        if ready:
            yield self._batch(ready)

    def _batch(self, ready: list[tuple[int, str, Any]]) -> Batch[Any]:
        batch: Batch[Any] = Batch(*zip(*ready, strict=True))
        ready.clear()
        return batch

    def _close_parts(self) -> None:
        for part in sorted(self._handed_out):
            if not self._under_way[part]:
                first = part * self.parts.size
                length = min(self.parts.size, self.total - first)
                self.parts.close(part, length, self.journal.read)
                self.journal.forget(range(first, first + length))
                self._handed_out.remove(part)

    def _num_errors(self) -> int:
        return self.journal.num_errors + self.parts.num_current_errors(self.journal.round)

    def _too_many_errors(self) -> bool:
        """Whether the share of judge errors is certain to be too large; no further batch is begun then."""
        return self._num_errors() > self.stage.max_error_share * self.total

    def _check_errors(self) -> None:
        """Give up where too many units failed."""
        if self._too_many_errors():
            round_, errors = self.journal.round, self._num_errors()
            first = self.parts.first_error(round_) or self.journal.first_error
            self.journal.next_round()
            raise JudgeError(
                f"{self.stage.name}: the judge failed on {errors} of {self.total} units, more than "
                f"max_error_share={self.stage.max_error_share}; first, {first}. --resume tries these again"
            )

    def _check_refused(self) -> None:
        """Give up where nothing was taken: that is a wrong setting, not a unit of a special kind."""
        round_ = self.journal.round
        refused = self.journal.num_refused + self.parts.num_refused(round_)
        if not refused or refused + self._num_errors() < self.total:
            return
        first = self.parts.first_error(round_) or self.journal.first_error
        self.journal.next_round()
        raise RequestRefusedError(
            f"{self.stage.name}: all of the {self.total} units were refused, none could be worked on; first, {first}. "
            "--resume tries these again"
        )


def _forecast(stage: Stage[Any], total: int, executor: Executor) -> dict[str, Any]:
    """Work on units spread over the input, write none of it, and say what all would cost."""
    wanted = min(stage.runner.forecast, total)
    picked = {index * total // wanted for index in range(wanted)} if wanted else set()
    ready = [
        (position, key, stage.prepare(item)) for position, (key, item) in enumerate(stage.units()) if position in picked
    ]
    size = max(1, min(stage.batch_size, len(ready) // 8))
    batches = [Batch(*zip(*ready[start : start + size], strict=True)) for start in range(0, len(ready), size)]
    spent = [(len(batch.tasks), paid) for batch, (_, paid) in executor.run(iter(batches))]
    forecast = {"stage": stage.name, **cost.forecast(spent, total)}
    write_json(stage.beside(".forecast.json"), forecast)
    print(cost.forecast_table(forecast))
    return forecast


# --- The end ----------------------------------------------------------------------------------------------------------


def _finish(stage: Stage[Any], journal: Journal, parts: Parts, total: int) -> dict[str, Any]:
    """Make OUT of the parts; returns the report."""
    kept = records = 0
    dropped: Counter[str] = Counter()
    numbers = range(max(1, -(-total // parts.size)))
    first_apart: dict[str, Any] | None = None
    num_errors = 0
    with atomic_path(stage.beside(".errors.jsonl")) as temporary, temporary.open("wb") as errors:
        for number in numbers:
            part = parts.read(number)
            kept += sum(map(bool, part.num_records))
            records += sum(part.num_records)
            dropped.update(part.dropped)
            for position, line in part.errors.items():
                num_errors += position not in part.reasons
                first_apart = first_apart or line
                errors.write(dump_line({"unit": line["unit"], "error": line["error"]}))
    if first_apart is None:
        stage.beside(".errors.jsonl").unlink()
    else:
        _say_kept_apart(stage, total, num_errors, dropped[REFUSED], first_apart)
    _write_output(stage, parts, numbers)
    return {
        "stage": stage.name,
        "read": total,
        "kept": kept,
        "records": records,
        "dropped": dict(sorted(dropped.items())),
        "errors": num_errors,
        **cost.summary(journal.cost, total),
    }


def _say_kept_apart(stage: Stage[Any], total: int, errors: int, refused: int, first: dict[str, Any]) -> None:
    counts = [f"{count} {what}" for count, what in ((refused, "refused"), (errors, "judge errors")) if count]
    print(
        f"{stage.name}: of {total} units {' and '.join(counts)}, kept apart in {stage.beside('.errors.jsonl')}; first, "
        f"{first['unit']}: {first['error']}",
        file=sys.stderr,
    )


def _write_output(stage: Stage[Any], parts: Parts, numbers: range) -> None:
    if stage.runner.sharded:
        for number in numbers:
            parts.check(number)
        if parts.folder != stage.out:
            parts.folder.replace(stage.out)
    elif stage.out.suffix in (".gz", ".parquet"):
        for number in numbers:
            parts.check(number)
        write_records(stage.out, read_records(parts.folder, stage.record))
    else:
        with atomic_path(stage.out) as temporary, temporary.open("wb") as stream:
            for number in numbers:
                parts.copy(number, cast(BinaryIO, stream))


def _parts_folder(stage: Stage[Any]) -> Path:
    """Where the parts are: beside OUT, or OUT itself where they have become it."""
    folder = stage.out if stage.runner.sharded and stage.out.is_dir() else stage.beside(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _clean_up(stage: Stage[Any]) -> None:
    shutil.rmtree(stage.beside(".parts"), ignore_errors=True)
    stage.beside(".journal").unlink(missing_ok=True)


def _remove_leavings(out: Path) -> None:
    """Temporary files of a process that was killed while it wrote OUT or a file beside it."""
    for path in [
        *out.parent.glob(f".{glob.escape(out.name)}*.tmp"),
        *out.parent.glob(f"{glob.escape(out.name)}.parts/.*.tmp"),
    ]:
        path.unlink()
