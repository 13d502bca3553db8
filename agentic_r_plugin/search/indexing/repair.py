"""`agentic-r repair`: adds the gold documents that a corpus lacks to the corpus and its index.

Missing documents are those that `coverage` counts as missing. They come from a second corpus, and from the documents
that the questions' own file holds (`forms.context_documents`). Only they are encoded. The output is an index folder
with a corpus of two shards, a link to the old corpus and the added passages; the old index and corpus do not change.

| file in the output | holds |
|---|---|
| `corpus/` | the corpus: links to the old shards, then the added passages |
| `before.jsonl`, `after.jsonl`, with reports | coverage of the old and of the new index |
| `repair.json` | number of added passages, documents that no source holds, shares before and after |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from agentic_r_plugin.answers import normalize
from agentic_r_plugin.config import BY_CONTENTS, FREE, deciding, setting
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.forms import context_documents, passage_fields
from agentic_r_plugin.questions import read_rows
from agentic_r_plugin.records import Passage, Question, text_id
from agentic_r_plugin.search import coverage
from agentic_r_plugin.search.corpus import PASSAGES, Corpus
from agentic_r_plugin.search.corpus_forms import passage_line
from agentic_r_plugin.search.coverage import CoverageConfig, gold_ids, gold_titles
from agentic_r_plugin.search.indexing import index as indexes
from agentic_r_plugin.search.indexing.faiss_files import open_index, reason_of, stored_vectors, write_index
from agentic_r_plugin.search.indexing.index import IndexManifest
from agentic_r_plugin.search.indexing.shards import RayWorkers, ShardJob, encode_shards, resolve_devices
from agentic_r_plugin.storage.claim import Claim, Output, require_new
from agentic_r_plugin.store import atomic_path, file_fingerprint, read_json, shards, write_json

REPORT = "repair.json"
_SHARD = 2048
"""Added passages between two resume points."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig(CoverageConfig):
    """Settings of `agentic-r repair`."""

    out: str = setting("folder of the repaired index and its corpus", FREE)
    source: str = setting(
        "corpus that holds missing documents; empty: only the questions' own", BY_CONTENTS, default=""
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search.backend == "service":
            raise ConfigError(
                "search.backend=service: a service searches the index that it was started with, not the repaired one; "
                "leave it out and name the folder of that index (--index), then start a service with the new folder"
            )
        if not self.spec().index:
            raise ConfigError("index: expected the folder of the index to repair (--index)")


def run(config: RepairConfig, *, resume: bool = False) -> None:
    """Write the repaired index, and print the coverage before and after.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was started, or finished, with other inputs.
        ConfigError: nothing to add, or a kind of index that takes no additions.
        RecordError: broken questions or corpus.
    """
    out, spec = Path(config.out), config.spec()
    if not resume:
        require_new(out, folder=True)
    manifest = indexes.read_manifest(spec.index)
    old_file = Path(spec.index) / manifest.index_file
    indexes.check_index_file(manifest, old_file)
    with ExitStack() as opened:
        corpus = opened.enter_context(Corpus(spec.corpus or manifest.corpus, table=spec.index))
        indexes.check_corpus(manifest, corpus)
        source = opened.enter_context(Corpus(config.source)) if config.source else None
        made_from = {
            "index": manifest.fingerprint(),
            "questions": file_fingerprint(config.questions),
            "format": config.format,
            "max_questions": config.max_questions,
            "topk": config.topk,
            "search": deciding(config.search),
            "source": source.fingerprint() if source else None,
        }
        with Output(out=out, made_from=made_from, done=indexes.MANIFEST, folder=True).claim(resume=resume) as held:
            if held.finished is None:
                _repair(config, held, manifest, old_file, corpus, source)
                shutil.rmtree(held.work, ignore_errors=True)
            _report(config, out)


def _repair(
    config: RepairConfig, held: Claim, manifest: IndexManifest, old_file: Path, corpus: Corpus, source: Corpus | None
) -> None:
    out, spec = held.out, config.spec()
    # The report is written after the corpus: a resume that finds it has nothing more to look up.
    if not (out / REPORT).is_file():
        added, not_found = missing_documents(
            lambda: islice(read_rows(config.questions, format=config.format), config.max_questions or None),
            corpus,
            source,
        )
        if not added:
            raise ConfigError(
                f"nothing to add: {corpus.path} lacks {len(not_found)} gold documents of {config.questions}"
                + (
                    "; neither the questions nor the source hold them"
                    if not_found
                    else ", or no question names any (metadata: gold_doc_ids, supporting_titles)"
                )
            )
        held.begin()
        _write_corpus(out / "corpus", corpus, Path(spec.index), added)
        write_json(out / REPORT, {"added": len(added), "not_found": not_found})
    _measure(config, out, "before", spec.index, str(corpus.path))
    added_file = shards(out / "corpus")[-1]
    device = resolve_devices(spec.device)[0]
    retriever = indexes.index_retriever(
        manifest, spec.retriever or None, device=device, precision=manifest.precision or "auto"
    )
    held.work.mkdir(exist_ok=True)
    job = ShardJob(
        corpus=str(added_file),
        table="",  # `table` and `load` are for worker processes; here this process encodes
        retriever=retriever.source,
        retriever_fingerprint=manifest.retriever_fingerprint,
        load={},
        folder=str(held.work),
        shard_size=_SHARD,
        batch_size=1024,
        max_batch_tokens=0,
        title_form=manifest.title_form,
    )
    with Corpus(added_file) as passages, Corpus(out / "corpus") as whole:
        encode_shards(job, passages, retriever, [device], RayWorkers())
        new = [job.path(start) for start in range(0, len(passages), _SHARD)]
        whole.save_table(out)
        repaired = replace(
            manifest, rows=len(whole), corpus=str(whole.path.resolve()), corpus_fingerprint=whole.fingerprint()
        )
    _extend(old_file, new, manifest, out / repaired.index_file, repaired.rows)
    indexes.finish(held, config, repaired)


Rows = Iterable[tuple[Question, Mapping[str, Any]]]
"""Questions with the rows that they were read from."""


def missing_documents(
    rows: Callable[[], Rows], corpus: Corpus, source: Corpus | None
) -> tuple[list[Passage], list[str]]:
    """(passages to add, gold documents that neither the source nor the questions hold).

    `rows` reads the questions from the start, twice: memory holds the names of gold documents and the missing passages.

    A document is known by its id if the question has `gold_doc_ids`, else by its title; all passages of the source with
    that title are added. A passage whose id the corpus has already, or that has none, gets a hash of its contents.
    """
    wanted: set[str] = set()
    ids: dict[str, None] = {}
    for question, _ in rows():
        wanted |= gold_titles(question)
        ids |= dict.fromkeys(name for name in sorted(gold_ids(question)) if name not in corpus)
    titles = wanted - _by_title(corpus, wanted).keys()
    in_source = _by_title(source, titles) if source else {}
    own_ids, own_titles = _own_documents(rows(), ids, titles)
    added: dict[str, Passage] = {}
    not_found: list[str] = []
    for name in ids:
        if source is not None and name in source:
            added[name] = source.by_id(name)
        elif name in own_ids:
            added[name] = own_ids[name]
        else:
            not_found.append(name)
    for title in sorted(titles):
        found = [source[row] for row in in_source.get(title, ())] if source else []
        for passage in found or own_titles.get(title, []):
            # Added by its id already.
            if added.get(passage.id) == passage:
                continue
            taken = not passage.id or passage.id in corpus or passage.id in added
            name = f"added-{text_id(passage.contents)}" if taken else passage.id
            added[name] = replace(passage, id=name)
        if not found and title not in own_titles:
            not_found.append(title)
    return list(added.values()), not_found


def _by_title(corpus: Corpus, wanted: Iterable[str]) -> dict[str, list[int]]:
    """Rows of the passages with these normalised titles."""
    found: dict[str, list[int]] = {}
    if wanted := set(wanted):
        for row, passage in enumerate(corpus):
            if (title := normalize(passage.title)) in wanted:
                found.setdefault(title, []).append(row)
    return found


def _own_documents(
    rows: Rows, ids: Collection[str], titles: Collection[str]
) -> tuple[dict[str, Passage], dict[str, list[Passage]]]:
    """Documents in the questions' own rows that have one of these ids or normalised titles: by id, and by title."""
    by_id: dict[str, Passage] = {}
    by_title: dict[str, list[Passage]] = {}
    for _, row in rows:
        for document in context_documents(row):
            name, contents = passage_fields(document)
            passage = Passage.from_contents(name, contents)
            if name in ids:
                by_id.setdefault(name, passage)
            elif not name and (title := normalize(passage.title)) in titles:
                known = by_title.setdefault(title, [])
                if passage not in known:
                    known.append(passage)
    return by_id, by_title


def _write_corpus(folder: Path, corpus: Corpus, index: Path, added: Iterable[Passage]) -> None:
    """Make the corpus folder: links to the shards of the old corpus, and one shard of added passages.

    A packed corpus is linked to as the index folder holds it; if that was built from one that is not packed, it is
    unpacked here.
    """
    folder.mkdir(exist_ok=True)
    old = [index / PASSAGES] if corpus.packed else shards(corpus.path)
    for number, shard in enumerate(old):
        link = folder / f"{number:05d}.jsonl"
        link.unlink(missing_ok=True)
        if shard.is_file():
            link.symlink_to(shard.resolve())
        else:
            corpus.save_passages(link)
    with atomic_path(folder / f"{len(old):05d}.jsonl") as temporary, temporary.open("wb") as stream:
        for passage in added:
            stream.write(passage_line(passage.id, passage.contents, passage.metadata))


def _extend(old: Path, new: Sequence[Path], manifest: IndexManifest, path: Path, rows: int) -> None:
    """Write the old index with the new vectors added.

    Flat and SQfp16 are copied block by block; other kinds are read into memory.

    Raises:
        ConfigError: faiss cannot add to this kind.
    """
    if manifest.kind in ("Flat", "SQfp16") and manifest.metric == "inner_product":
        kept = stored_vectors(open_index(old, mapped=True))
        # These kinds need no training.
        write_index(path, [kept, *new], kind=manifest.kind, rows=rows, dim=manifest.dim, train_rows=1)
        return
    index = open_index(old, mapped=False)
    try:
        for shard in new:
            index.add(np.load(shard))
    except RuntimeError as error:
        raise ConfigError(
            f"{old}: an index of kind {manifest.kind} takes no additions ({reason_of(error)}); build one of the corpus "
            f"{path.parent / 'corpus'} with agentic-r index"
        ) from error
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def _measure(config: RepairConfig, out: Path, name: str, index: str, corpus: str) -> None:
    print(f"{name}:")
    coverage.run(replace(config, out=str(out / f"{name}.jsonl"), index=index, corpus=corpus), resume=True)


def _report(config: RepairConfig, out: Path) -> None:
    """Measure the coverage of the repaired index, and add both to the report."""
    _measure(config, out, "after", str(out), str(out / "corpus"))
    report = read_json(out / REPORT)
    for name in ("before", "after"):
        report[name] = read_json(out / f"{name}.jsonl.report.json")["shares"]
    write_json(out / REPORT, report)
    print(f"{report['added']} passages added; {len(report['not_found'])} gold documents in no source")
    if report["not_found"]:
        print(f"first: {json.dumps(report['not_found'][:5], ensure_ascii=False)}; all are in {out / REPORT}")
