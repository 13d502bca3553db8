"""The shell around a data stage: files, progress, resume and the report. The stage itself is a function on records.

A stage works on units (a question, a query). Finished units are appended to `OUT.journal`, one line each, and synced
after every batch; a process that is killed loses at most the batch in flight. When all units are done the journal is
turned into OUT in the order of the input, so OUT does not depend on interruptions; `OUT.report.json` is written last,
so its existence means done.

| beside OUT | holds |
|---|---|
| `OUT.manifest.json` | configuration and fingerprints of the inputs; a resume with others is refused |
| `OUT.journal` | units finished so far; removed at the end |
| `OUT.errors.jsonl` | units whose judge failed, when there are any |
| `OUT.report.json` | counts of read, kept and dropped, and the cost |
"""

from __future__ import annotations

import dataclasses
import glob
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from agentic_r_plugin import __version__
from agentic_r_plugin.config import to_dict
from agentic_r_plugin.data.journal import Journal, Outcome
from agentic_r_plugin.errors import JudgeError, ManifestMismatchError, OutputExistsError, RecordError
from agentic_r_plugin.records import Record
from agentic_r_plugin.rollout import RolloutCost
from agentic_r_plugin.store import (
    atomic_path,
    dump_line,
    file_fingerprint,
    read_json,
    require_absent,
    write_json,
    write_records,
)

Item = TypeVar("Item")

UNRECORDED = {"manifest": False}
"""Metadata of a configuration field that does not change the records (paths, batch sizes)."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[Item]):
    """One run of a stage.

    Args:
        name: the command.
        config: its configuration; fields with metadata `UNRECORDED` and the backends' settings stay out of the
            comparison on resume.
        out: output file.
        inputs: files that are read, by role.
        models: fingerprints of the models used, by role.
        record: type of the records written.
        units: reads the input from its start: (key, item), each key once.
        work: the stage: one outcome per item, in order; it is given one batch at a time.
        batch_size: units a batch; the most that is lost when the process is killed.
        cost: what `work` adds its cost to.
        max_error_share: more judge errors than this share of the units end the stage with an error.
    """

    name: str
    config: Any
    out: Path
    inputs: dict[str, Path]
    units: Callable[[], Iterable[tuple[str, Item]]]
    work: Callable[[Sequence[Item]], Iterable[Outcome]]
    batch_size: int
    record: type[Record]
    models: dict[str, str] = field(default_factory=dict)
    cost: RolloutCost = field(default_factory=RolloutCost)
    max_error_share: float = 0.1

    def beside(self, suffix: str) -> Path:
        """A file that belongs to OUT."""
        return self.out.with_name(self.out.name + suffix)


def run_stage(stage: Stage[Item], *, resume: bool) -> dict[str, Any]:
    """Run a stage to its end, or go on where it stopped; returns the report.

    Raises:
        OutputExistsError: the output, or work on it, is there and `resume` was not asked for; or another process
            works on it.
        ManifestMismatchError: resumed with another configuration, input or model than it was begun with.
        RecordError: the input holds a broken record or one unit twice, or the journal is damaged.
        JudgeError: too large a share of the units failed; they are tried again by a resume.
    """
    manifest = _manifest(stage)
    if _finished(stage, manifest, resume=resume):
        stage.beside(".journal").unlink(missing_ok=True)
        return dict(read_json(stage.beside(".report.json")))
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    total = _count_units(stage)
    write_json(stage.beside(".manifest.json"), manifest)
    with Journal(stage.beside(".journal")) as journal:
        _work_off(stage, journal, total)
        _remove_leavings(stage.out)
        report = _compact(stage, journal)
        write_json(stage.beside(".report.json"), report)
        journal.path.unlink()
    return report


# --- Manifest ---------------------------------------------------------------------------------------------------------


def _manifest(stage: Stage[Any]) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "version": __version__,
        "made_from": _recorded(stage.config)
        | {f"input {role}": file_fingerprint(path) for role, path in stage.inputs.items()}
        | {f"fingerprint of {role}": value for role, value in stage.models.items()},
        "config": to_dict(stage.config),
    }


def _recorded(config: Any) -> dict[str, Any]:
    """The configuration's fields that decide what the records are."""
    return {
        item.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for item in dataclasses.fields(config)
        if item.metadata.get("manifest", True)
        for value in [getattr(config, item.name)]
    }


def _finished(stage: Stage[Any], manifest: dict[str, Any], *, resume: bool) -> bool:
    """Whether nothing is left to do; refuses to touch what is not ours to go on with."""
    manifest_path = stage.beside(".manifest.json")
    if not resume:
        require_absent(stage.out)
        if stage.beside(".journal").exists():
            raise OutputExistsError(
                f"{stage.beside('.journal')}: work on {stage.out} was begun; --resume goes on with it, or remove it"
            )
        return False
    if not manifest_path.exists():
        for path in (stage.out, stage.beside(".journal")):
            if path.exists():
                raise ManifestMismatchError(
                    f"{path} is there without {manifest_path.name}: what it was made from is unknown; "
                    "remove it or choose another path"
                )
        return False
    before, now = read_json(manifest_path).get("made_from", {}), json.loads(json.dumps(manifest["made_from"]))
    changed = [
        f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ManifestMismatchError(
            f"{stage.out}: cannot go on with what was begun from something else: {'; '.join(changed)}. "
            "Give the same inputs, or another --out"
        )
    return stage.out.exists() and stage.beside(".report.json").exists()


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- Work -------------------------------------------------------------------------------------------------------------


def _count_units(stage: Stage[Any]) -> int:
    """Read the whole input once, so that a broken line is found before anything expensive is done."""
    seen: set[str] = set()
    for key, _ in stage.units():
        if key in seen:
            raise RecordError(f"{key!r} occurs twice in the input of {stage.name}; every unit must occur once")
        seen.add(key)
    return len(seen)


def _work_off(stage: Stage[Item], journal: Journal, total: int) -> None:
    from tqdm import tqdm

    pending = ((key, item) for key, item in stage.units() if not journal.done(key))
    with tqdm(
        total=total, initial=journal.num_done - len(journal.errors), desc=stage.name, unit="unit", disable=None
    ) as progress:
        while batch := list(islice(pending, stage.batch_size)):
            before, start = to_dict(stage.cost), time.monotonic()
            outcomes = list(stage.work([item for _, item in batch]))
            spent = {key: value - before[key] for key, value in to_dict(stage.cost).items()}
            journal.append(
                [(key, outcome) for (key, _), outcome in zip(batch, outcomes, strict=True)],
                spent | {"seconds": time.monotonic() - start},
            )
            progress.update(len(batch))


def _compact(stage: Stage[Any], journal: Journal) -> dict[str, Any]:
    """Write OUT in input order; returns the report."""
    read = kept = records = 0
    dropped: Counter[str] = Counter()
    errors: list[dict[str, Any]] = []

    def in_order() -> Iterator[Record]:
        nonlocal read, kept, records
        for key, _ in stage.units():
            line = journal.read(key)
            read += 1
            kept += bool(line["records"])
            records += len(line["records"])
            if line["dropped"] is not None:
                dropped[line["dropped"]] += 1
            if line["error"] is not None:
                errors.append({"unit": key, "error": line["error"]})
            for data in line["records"]:
                yield stage.record.from_dict(data)

    failed = journal.errors
    if failed and len(failed) > stage.max_error_share * journal.num_done:
        example = journal.read(failed[0])["error"]
        raise JudgeError(
            f"{stage.name}: the judge failed on {len(failed)} of {journal.num_done} units, more than "
            f"max_error_share={stage.max_error_share}; first, {failed[0]}: {example}. --resume tries these again"
        )
    write_records(stage.out, in_order())
    if errors:
        with atomic_path(stage.beside(".errors.jsonl")) as temporary:
            temporary.write_bytes(b"".join(map(dump_line, errors)))
    else:
        stage.beside(".errors.jsonl").unlink(missing_ok=True)
    return {
        "stage": stage.name,
        "read": read,
        "kept": kept,
        "records": records,
        "dropped": dict(sorted(dropped.items())),
        "errors": len(errors),
        **{key: round(value, 3) for key, value in sorted(journal.cost.items())},
    }


def _remove_leavings(out: Path) -> None:
    """Temporary files of a process that was killed while it wrote OUT or a file beside it."""
    for path in out.parent.glob(f".{glob.escape(out.name)}*.tmp"):
        path.unlink()
