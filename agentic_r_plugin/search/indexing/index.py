"""`agentic-r index`: encodes a corpus and builds a faiss index that FlashRAG can read.

The index folder holds `{method}_{kind}.index` (row i is row i of the corpus), the saved table of the corpus, and
`manifest.json`, which is written last: a folder with a manifest is complete. Shards of vectors are kept during the
work, so that an interrupted run can continue (`storage.claim`). For the kinds listed in `faiss_files`, memory does not
grow with the corpus.
"""

from __future__ import annotations

import errno
import logging
import shutil
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import faiss

from agentic_r_plugin import compute
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, fingerprint, save_config, setting
from agentic_r_plugin.errors import AgenticRError, ConfigError, IndexMismatchError, located
from agentic_r_plugin.records import Record, since
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import TITLE_FORMS, Retriever, RetrieverRecord
from agentic_r_plugin.search.families import FAMILIES, POOLINGS
from agentic_r_plugin.search.indexing import adopt, milvus
from agentic_r_plugin.search.indexing.faiss_files import ALIASES, bytes_per_row, empty_index, write_index
from agentic_r_plugin.search.indexing.shards import RayWorkers, ShardJob, encode_shards, resolve_devices
from agentic_r_plugin.storage.claim import MANIFEST as BEGUN
from agentic_r_plugin.storage.claim import Claim, Output, require_new
from agentic_r_plugin.store import absolute, read_json, sampled_fingerprint

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of `agentic-r index`."""

    corpus: str = setting("corpus file or folder, in any form of docs/formats.md", BY_CONTENTS)
    retriever: str = setting("retriever checkpoint folder, hub name, or builtin:minilm", BY_CONTENTS)
    out: str = setting("index folder to write", FREE)
    kind: str = setting("faiss index: Flat, SQ8, fp16, IVF4096,PQ64, HNSW32, …", default="Flat")
    method: str = setting("FlashRAG's retrieval_method; names the index file", default="agentic_r")
    preset: str = setting(f"prefixes and pooling of a family: auto, {', '.join(FAMILIES)}", default="auto")
    pooling: str = setting(f"{', '.join(POOLINGS)}; auto: the checkpoint's or the preset's", default="auto")
    query_prompt: str | None = setting("prefix of queries, in place of the model's", default=None)
    passage_prompt: str | None = setting("prefix of passages, in place of the model's", default=None)
    formulation: str | None = setting("query formulation in place of the recorded one", default=None)
    max_length: int | None = setting("tokens of query and passage, in place of recorded", default=None)
    title_form: str = setting(
        f"how passages are encoded: {', '.join(TITLE_FORMS)} (title, then text)", default="contents"
    )
    adopt: list[str] = setting(
        "faiss file, .npy or .safetensors to take over; parts: a pattern, or several times",
        BY_CONTENTS,
        {"flag": "--adopt"},
        default_factory=list,
    )
    allow_pickle: bool = setting("adopt Tevatron's pickles, which can run any code", FREE, default=False)
    seed: int = setting("draws the passages that adopt compares", FREE, default=0)
    device: str = setting("auto: all GPUs of this node, else cpu; or cuda:0,cuda:1", FREE, default="auto")
    precision: str = setting("float32, bfloat16, float16; auto: bfloat16 where native", default="auto")
    batch_size: int = setting("passages of one forward pass at most", FREE, default=1024)
    max_batch_tokens: int = setting("tokens of one forward pass at most; 0: by the device", FREE, default=0)
    shard_size: int = setting("passages between two resume points", default=2048)
    train_rows: int = setting("vectors that SQ8, IVF and PQ are trained on at most", default=262_144)
    ray_workers: int = setting("Ray actors that encode; 0: without Ray", FREE, default=0)
    ray_address: str = setting("Ray cluster (auto, ray://…); empty: one on this machine", FREE, default="")
    ray_gpus: float = setting("GPUs of one Ray actor", FREE, default=0.0)

    milvus: milvus.MilvusSettings = setting(
        "a Milvus collection in place of a faiss file", LATER, default_factory=milvus.MilvusSettings
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size", "train_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("max_batch_tokens", "ray_workers", "ray_gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0, found {getattr(self, name)}")
        if self.title_form not in TITLE_FORMS:
            raise ConfigError(f"title_form={self.title_form!r}: expected {', '.join(TITLE_FORMS)}")
        if not self.method or "/" in self.method:
            raise ConfigError(f"method {self.method!r} must be usable as a file name")
        if "/" in self.kind:
            raise ConfigError(f"index kind {self.kind!r}: expected faiss' name of a kind, such as Flat or IVF4096,PQ64")


@dataclass(frozen=True, kw_only=True)
class IndexManifest(Record):
    """Inputs that an index was made from; its presence means that the index is complete."""

    schema: ClassVar[str | None] = "index/2"

    method: str
    rows: int
    dim: int
    metric: str
    """Metric of the index file: inner_product, or l2 of vectors of length 1; scores are inner products."""
    corpus: str
    corpus_fingerprint: str
    retriever: str
    retriever_fingerprint: str
    retriever_record: dict[str, Any]
    """Formulation, prefixes, lengths and pooling used to encode the passages."""
    preset: str
    formulation_override: str | None
    max_length_override: int | None
    versions: dict[str, str]
    pooling: str = "auto"
    query_prompt_override: str | None = None
    passage_prompt_override: str | None = None
    kind: str = "Flat"
    """faiss' factory string, or Milvus' type of index."""
    precision: str | None = None
    """Floating-point type in which the passages were encoded."""
    index_bytes: int | None = None
    """Size of the index file when it was completed."""
    index_sample: str | None = None
    """`store.sampled_fingerprint` of the index file, or `Collection.sample`, when it was completed."""
    title_form: str = "contents"
    adopted: str | None = None
    """Fingerprint of the adopted files, whose vectors somebody else encoded."""
    milvus: dict[str, Any] | None = field(default=None, metadata=since(2))
    """Address, collection, parameters and fields, if the vectors are in Milvus; `recall` of the exact top 20."""

    @property
    def index_file(self) -> str:
        """Name of the faiss file, built as in FlashRAG."""
        return f"{self.method}_{self.kind}.index"

    def fingerprint(self) -> str:
        """Changes with the corpus, the retriever, its use or the kind; not when files are moved."""
        # Later fields are left out at their defaults: indexes that were built before keep their fingerprints.
        kind = () if self.kind == "Flat" else (self.kind,)
        place = () if self.milvus is None else ("milvus", self.milvus["params"])
        return fingerprint(*self._vectors(), *kind, *place)

    def vectors_fingerprint(self) -> str:
        """Like `fingerprint`, but the same for all kinds of index over the same vectors."""
        return fingerprint(*self._vectors())

    def _vectors(self) -> tuple[Any, ...]:
        form = () if self.title_form == "contents" else (self.title_form,)
        adopted = () if self.adopted is None else (self.adopted,)
        return self.corpus_fingerprint, self.retriever_fingerprint, self.rows, self.dim, self.metric, *form, *adopted


def run(config: IndexConfig, *, resume: bool = False) -> IndexManifest:
    """Build the index that `config` describes; returns its manifest.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was started, or finished, with other inputs.
        RecordError, ConfigError: a broken corpus or retriever; nothing is written in that case.
    """
    out = Path(config.out)
    if not resume:
        require_new(out, folder=True)
    try:
        return _build(config, out, resume=resume)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise AgenticRError(
            f"{out}: no room to write ({error.strerror}); finished shards are kept, make room and go on with --resume"
        ) from error


def _build(config: IndexConfig, out: Path, *, resume: bool) -> IndexManifest:
    devices = resolve_devices(config.device)
    # On resume the table of the interrupted run is mapped instead of scanning the corpus again.
    with Corpus(config.corpus, table=out) as corpus:
        # Ray workers may have other devices than this process, so they resolve `auto` themselves.
        precision = config.precision if config.ray_workers else compute.resolve(config.precision, devices[0])
        load: dict[str, Any] = {
            "preset": config.preset,
            "pooling": config.pooling,
            "precision": precision,
            "formulation": config.formulation,
            "query_max_length": config.max_length,
            "passage_max_length": config.max_length,
            "query_prompt": config.query_prompt,
            "passage_prompt": config.passage_prompt,
        }
        retriever = Retriever.load(config.retriever, device=devices[0], **load)
        # Workers take this record: deriving it again would also report it again on stderr.
        load["untrained"] = retriever.record
        manifest = replace(_manifest(config, corpus, retriever), precision=None if config.adopt else precision)
        if config.milvus.uri:
            manifest = milvus.placed(config.milvus, manifest)
        with _output(out, manifest).claim(resume=resume) as held:
            if held.finished is None:
                if config.adopt:
                    _adopt(config, manifest, held, corpus, retriever)
                else:
                    _index(config, manifest, held, corpus, retriever, devices, load)
            shutil.rmtree(held.work, ignore_errors=True)
    return read_manifest(out)


def _output(out: Path, manifest: IndexManifest) -> Output:
    made_from: dict[str, Any] = {
        "corpus": manifest.corpus_fingerprint,
        "retriever": manifest.retriever_fingerprint,
        "precision": manifest.precision,
        "kind": manifest.kind,
    }
    if manifest.title_form != "contents":
        made_from["title_form"] = manifest.title_form
    if manifest.adopted is not None:
        made_from["adopted"] = manifest.adopted
    if manifest.milvus is not None:
        made_from["milvus"] = {name: manifest.milvus[name] for name in ("params", "fields")}
    # All kinds use the same vectors, so unfinished work can be completed as another kind.
    return Output(out=out, made_from=made_from, done=MANIFEST, folder=True, at_end=frozenset({"kind", "milvus"}))


def _index(
    config: IndexConfig,
    manifest: IndexManifest,
    held: Claim,
    corpus: Corpus,
    retriever: Retriever,
    devices: list[str],
    load: dict[str, Any],
) -> None:
    out = held.out
    if manifest.milvus is None:
        # Only to refuse an impossible kind before anything is encoded.
        empty_index(manifest.kind, manifest.dim)
    shard_size = held.noted("shard_size", config.shard_size)  # a resume keeps it: shards are named by row
    held.begin(shard_size=shard_size)
    if manifest.milvus is not None:
        milvus.prepare(manifest, held, timeout_s=config.milvus.timeout_s)
    held.work.mkdir(exist_ok=True)
    _require_room(held, manifest)
    corpus.save_table(out)
    job = ShardJob(
        corpus=absolute(config.corpus),
        table=absolute(str(out)),
        retriever=absolute(config.retriever),
        retriever_fingerprint=manifest.retriever_fingerprint,
        load=load,
        folder=absolute(str(held.work)),
        shard_size=shard_size,
        batch_size=config.batch_size,
        max_batch_tokens=config.max_batch_tokens,
        title_form=config.title_form,
    )
    ray = RayWorkers(count=config.ray_workers, address=config.ray_address, gpus=config.ray_gpus)
    encode_shards(job, corpus, retriever, devices, ray)
    shards = [job.path(start) for start in range(0, manifest.rows, shard_size)]
    if manifest.milvus is not None:
        manifest = milvus.load(manifest, held, shards, corpus, timeout_s=config.milvus.timeout_s)
    else:
        index_file = out / manifest.index_file
        rows, dim = manifest.rows, manifest.dim
        write_index(index_file, shards, kind=manifest.kind, rows=rows, dim=dim, train_rows=config.train_rows)
    finish(held, config, manifest)


def finish(held: Claim, config: Any, manifest: IndexManifest) -> None:
    """Write the settings, then the manifest, with size and samples of the index file."""
    save_config(config, held.out / "config.yaml")
    if manifest.milvus is None:
        file = held.out / manifest.index_file
        manifest = replace(manifest, index_bytes=file.stat().st_size, index_sample=sampled_fingerprint(file))
    held.finish(manifest.to_dict())
    log.info("indexed %d passages in %s", manifest.rows, held.out)


def _adopt(config: IndexConfig, manifest: IndexManifest, held: Claim, corpus: Corpus, retriever: Retriever) -> None:
    held.begin()
    held.work.mkdir(exist_ok=True)
    kind = config.kind if manifest.milvus is None else "Flat"
    try:
        source = adopt.open_source(
            adopt.files_of(config.adopt), kind, corpus, held.work, allow_pickle=config.allow_pickle
        )
        adopt.require_agreement(source, corpus, retriever, config.title_form, config.seed)
    except AgenticRError:  # remove everything, so that the folder can be used again
        shutil.rmtree(held.work)
        held.manifest.unlink()
        raise
    corpus.save_table(held.out)
    if manifest.milvus is not None:
        milvus.prepare(manifest, held, timeout_s=config.milvus.timeout_s)
        manifest = milvus.load(manifest, held, source.matrices(), corpus, timeout_s=config.milvus.timeout_s)
    else:
        manifest = replace(manifest, kind=source.kind, metric=source.written_metric)
        source.write(held.out / manifest.index_file, config.train_rows)
    finish(held, config, manifest)


def _require_room(held: Claim, manifest: IndexManifest) -> None:
    """Raise `ConfigError` if the shards of vectors and the index cannot both fit on the disk."""
    vectors = manifest.rows * manifest.dim * 4
    there = sum(path.stat().st_size for path in held.work.glob("*.npy"))
    if manifest.milvus is None:
        index = manifest.rows * bytes_per_row(manifest.kind, manifest.dim)
    else:  # milvus-lite stores the vectors in the index folder, a server elsewhere
        index = vectors if manifest.milvus["uri"] == milvus.LITE else 0
    needed, free = vectors + index - there, shutil.disk_usage(held.out).free
    if needed > free:
        raise ConfigError(
            f"{held.out}: building needs up to {needed / 1e9:.1f} GB of disk (vectors as shards, then the index), "
            f"found {free / 1e9:.1f} GB free; choose another folder or make room"
        )


def _manifest(config: IndexConfig, corpus: Corpus, retriever: Retriever) -> IndexManifest:
    folder = Path(config.retriever)
    return IndexManifest(
        method=config.method,
        rows=len(corpus),
        dim=retriever.dim,
        metric="inner_product",
        kind=ALIASES.get(config.kind, config.kind),
        corpus=str(corpus.path.resolve()),
        corpus_fingerprint=corpus.fingerprint(),
        retriever=str(folder.resolve()) if folder.exists() else config.retriever,
        retriever_fingerprint=retriever.fingerprint(),
        retriever_record=retriever.record.to_dict(),
        preset=config.preset,
        formulation_override=config.formulation,
        max_length_override=config.max_length,
        pooling=config.pooling,
        query_prompt_override=config.query_prompt,
        passage_prompt_override=config.passage_prompt,
        title_form=config.title_form,
        adopted=fingerprint(*map(sampled_fingerprint, adopt.files_of(config.adopt))) if config.adopt else None,
        versions={name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
        | {"faiss": str(faiss.__version__)},
    )


def read_manifest(folder: str | Path) -> IndexManifest:
    """Read the manifest of a finished index.

    Raises:
        ConfigError: no index in the folder, or an unfinished one.
        RecordError: a broken manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        # A retriever's folder has the same file.
        begun = (folder / BEGUN).is_file() and not (folder / "agentic_r.json").is_file()
        state = "an unfinished index; go on with --resume" if begun else "no index there"
        raise ConfigError(f"{folder}: {state} (agentic-r index builds one)")
    with located(folder / MANIFEST):
        return IndexManifest.from_dict(read_json(folder / MANIFEST))


def index_retriever(
    manifest: IndexManifest, name: str | None = None, *, device: str = "auto", precision: str = "auto"
) -> Retriever:
    """Load the retriever that an index was made with, as it was used then; for models without our record, the manifest
    holds the record.

    Args:
        name: its current location; None means the location at the time.

    Raises:
        IndexMismatchError: the retriever found there is a different one.
    """
    retriever = Retriever.load(
        name or manifest.retriever,
        preset=manifest.preset,
        pooling=manifest.pooling,
        device=device,
        precision=precision,
        untrained=RetrieverRecord.from_dict(manifest.retriever_record),
        formulation=manifest.formulation_override,
        query_max_length=manifest.max_length_override,
        passage_max_length=manifest.max_length_override,
        query_prompt=manifest.query_prompt_override,
        passage_prompt=manifest.passage_prompt_override,
    )
    check_retriever(manifest, retriever)
    return retriever


def check_index_file(manifest: IndexManifest, path: Path) -> None:
    """Raise `IndexMismatchError` unless the index file exists and matches the finished one in size and samples."""
    if manifest.milvus is not None:
        raise IndexMismatchError(f"{path.parent}: its vectors are in Milvus, not in a file; use search.backend=milvus")
    if path.is_symlink() and not path.exists():
        raise IndexMismatchError(
            f"{path}: the adopted index file {path.readlink()} was moved or deleted; put it back, or link to its new "
            f"place: ln -sfn NEW {path}"
        )
    if not path.is_file():
        raise IndexMismatchError(f"{path}: the index file is missing; build it again with agentic-r index")
    found, expected = path.stat().st_size, manifest.index_bytes
    if expected is not None and found != expected:
        raise IndexMismatchError(
            f"{path}: expected {expected} bytes, found {found}; the index file was cut or replaced, build it again "
            "with agentic-r index"
        )
    if manifest.index_sample is not None and sampled_fingerprint(path) != manifest.index_sample:
        raise IndexMismatchError(
            f"{path}: these are not the bytes that its manifest describes; the index file was replaced, build it again "
            "with agentic-r index"
        )


def check_retriever(manifest: IndexManifest, retriever: Retriever) -> None:
    """Raise `IndexMismatchError` unless the index was made with this retriever."""
    if (found := retriever.fingerprint()) != manifest.retriever_fingerprint:
        raise IndexMismatchError(
            f"index built with retriever {manifest.retriever} ({manifest.retriever_fingerprint}, formulation "
            f"{manifest.retriever_record.get('formulation')}) does not belong to retriever {retriever.source} "
            f"({found}, formulation {retriever.record.formulation}); build it again with agentic-r index"
        )


def check_corpus(manifest: IndexManifest, corpus: Corpus) -> None:
    """Raise `IndexMismatchError` unless the index was made from this corpus."""
    if (found := corpus.fingerprint()) != manifest.corpus_fingerprint:
        raise IndexMismatchError(
            f"index built from corpus {manifest.corpus} ({manifest.corpus_fingerprint}, {manifest.rows} passages) does "
            f"not belong to corpus {corpus.path} ({found}, {len(corpus)} passages); build it again with agentic-r index"
        )
