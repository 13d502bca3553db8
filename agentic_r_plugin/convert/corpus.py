"""`agentic-r convert corpus`: whole articles and folders of documents cut into passages; contexts of questions.

`chonkie` packs sentences into passages of at most `words` words; `markitdown` reads HTML, PDF and Word. Each passage
names its place: file or article, character positions in that text, and the page of a PDF. The paragraphs in the
original files of HotpotQA, 2WikiMultihopQA, MuSiQue and BrowseComp-Plus are pooled, each once, and stay whole.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentic_r_plugin.answers import UNSPACED
from agentic_r_plugin.config import BY_CONTENTS, FREE, check_least, fingerprint, setting
from agentic_r_plugin.convert.hub import HubConfig, push_file
from agentic_r_plugin.convert.passages import context_passage
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, Unit, for_workers, run_stage
from agentic_r_plugin.errors import ConfigError, RecordError, located, not_utf8
from agentic_r_plugin.forms import contents_of, context_documents, passage_fields, passage_metadata
from agentic_r_plugin.records import CorpusLine, Passage
from agentic_r_plugin.search.corpus_forms import corpus_rows
from agentic_r_plugin.storage.lookup import HashSet, key_hash
from agentic_r_plugin.storage.table import UnitResult
from agentic_r_plugin.store import read_lines, sampled_fingerprint, shards

PLAIN = (".md", ".markdown", ".txt")
"""Documents that are text already; their positions are those of the file's characters."""

CONVERTERS = {".html": "HtmlConverter", ".htm": "HtmlConverter", ".pdf": "PdfConverter", ".docx": "DocxConverter"}
"""Suffix -> class in `markitdown.converters`."""

_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]{{1,64}}")
"""What counts as one word: a character of a script without spaces, or at most 64 characters up to the next space."""

_SENTENCE_ENDS = [". ", "! ", "? ", "\n", "。", "！", "？"]
_TEXT = {"contents", "text"}
"""Fields that a row of a corpus has one of, and a question has none of."""

_ROWS = 1024
"""Articles or paragraphs of a file between two resume points, each of which is a wait for the disk."""

_HEADING = re.compile(r"^# +(.+?)[ #\r]*$", re.M)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(HubConfig):
    """Cut articles or a folder of documents into passages, or pool questions' contexts, and write them as a corpus."""

    in_: str = setting(
        "folder of .md, .txt, .html, .pdf, .docx; corpus of articles; questions with contexts", BY_CONTENTS
    )
    out: str = setting("corpus file to write", FREE)
    words: int = setting("most words of a passage; contexts stay whole", default=100)
    batch_size: int = setting("documents of a folder read at once", FREE, default=16)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def __post_init__(self) -> None:
        check_least(self, words=1)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text to be cut."""

    source: str
    """Path in the folder, or the article's id; ids of passages begin with it."""
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Put on every passage."""
    whole: bool = False
    """Whether it is one passage, whatever its length."""


@dataclass(frozen=True, kw_only=True)
class CutPassage(CorpusLine):
    """A corpus line with the place of its text."""

    metadata: dict[str, Any]
    """`source`, `start` and `end` (characters of the document's text, `end` excluded), `page` of a PDF (from 1), and
    what was known of an article, such as `url`."""


def run(config: CorpusConfig, *, resume: bool = False) -> None:
    """Run the command `convert corpus`.

    A document that cannot be read is left out, counted as refused, and named in `OUT.errors.jsonl`.

    Raises:
        ConfigError: no documents, or `markitdown` is needed and not installed.
        RecordError: an article without id or text; names file and line.
        RequestRefusedError: no document could be read.
        BackendError: the upload failed; the corpus is written and whole.
    """
    given = Path(config.in_).absolute()  # workers may run elsewhere
    files = find_documents(given)
    if not files and not given.exists():
        raise RecordError("no such file or folder", path=given)
    folder = given if given.is_dir() else given.parent
    if any(file.suffix.lower() in CONVERTERS for file in files) and find_spec("markitdown") is None:
        raise ConfigError("HTML, PDF and Word need markitdown: pip install 'agentic-r-plugin[documents]'")
    names = [file.relative_to(folder).as_posix() for file in files]
    stage = Stage[Any](
        name="convert corpus",
        config=config,
        inputs={} if files else {"articles": given},
        models={"documents": fingerprint([(n, sampled_fingerprint(f)) for n, f in zip(names, files, strict=True)])},
        record=CutPassage,
        units=lambda: map(Unit, names, map(str, files)) if files else articles(given),
        worker=partial(CutWorker, for_workers(config), str(folder)),
        batch_size=config.batch_size if files else max(_ROWS, config.batch_size),
    )
    report = run_stage(stage, resume=resume)
    if config.runner.forecast:
        return
    rows, documents = report["records"], report["kept"]
    print(f"{config.out}: {rows} passages of {documents} documents", file=sys.stderr)
    text = (
        f"# Passages\n\n{rows} passages of {documents} documents, written by `agentic-r convert corpus`. `contents` is "
        "the title in quotation marks, a line break and the text; `metadata` holds the place in the document."
    )
    push_file(config, text, rows=rows, task="text-retrieval", tags=["corpus"])


def find_documents(folder: Path) -> list[Path]:
    """Documents in a folder and its subfolders, sorted, or the given document; none for corpora and folders of shards.

    Prints on stderr which other files are left out. Hidden files and folders are ignored.
    """
    if not folder.is_dir():
        return [folder] if folder.is_file() and folder.suffix.lower() in (*PLAIN, *CONVERTERS) else []
    every = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))]
    found = sorted(path for path in every if path.suffix.lower() in (*PLAIN, *CONVERTERS))
    if all(path.name == "README.md" for path in found):  # which describes the shards next to it, if there are any
        try:
            return [] if shards(folder) else found
        except RecordError:
            if not found:
                raise
    others = Counter(path.suffix.lower() or path.name for path in every if path not in set(found))
    if others:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        print(f"convert corpus: files of other kinds are left out: {listed}", file=sys.stderr)
    return found


def _hidden(path: Path) -> bool:
    # Word names its lock files `~$...`.
    return any(part.startswith((".", "~$")) for part in path.parts)


def articles(path: Path) -> Iterator[Unit[Document]]:
    """Every row of a corpus, or every paragraph of the contexts of questions, each paragraph once.

    The key is the id; that of a paragraph without one is a hash of its title and text.

    Raises:
        RecordError: a row without id or text; names file and line.
    """
    seen = HashSet()
    for shard in shards(path):
        for number, row in corpus_rows(shard) if ".tsv" in shard.suffixes else read_lines(shard):
            with located(shard, number):
                documents = context_documents(row) if isinstance(row, Mapping) and not _TEXT & row.keys() else []
                passages = [item for item in map(context_passage, documents) if seen.add(key_hash(item.id))]
                if not documents:
                    passages = [Passage.from_contents(*passage_fields(row), passage_metadata(row))]
            for passage in passages:
                article = Document(
                    source=passage.id,
                    title=passage.title,
                    text=passage.text,
                    metadata=dict(passage.metadata),
                    whole=bool(documents),
                )
                yield Unit(article.source, article, shard, number)


class CutWorker(StageWorker):
    """Reads documents and cuts them into passages."""

    def __init__(self, config: CorpusConfig, folder: str) -> None:
        super().__init__()
        self.config, self.folder = config, Path(folder)

    def work(self, batch: Sequence[str | Document]) -> list[UnitResult]:
        """The passages of every document, or why it cannot be read."""
        return [self._cut(item) for item in batch]

    def _cut(self, item: str | Document) -> UnitResult:
        try:
            document = item if isinstance(item, Document) else read_document(Path(item), self.folder)
            if document.whole:
                contents = contents_of(document.title, document.text)
                return UnitResult(records=(CutPassage(id=document.source, contents=contents, metadata={}),))
            passages = tuple(cut(document, self.config.words, self._chunker))
        except Exception as error:  # parsers of broken files raise errors of every type
            return UnitResult.refused(f"{type(error).__name__}: {error}")
        no_text = UnitResult.refused("no text in it (scanned pages need OCR first)")
        return UnitResult(records=passages) if passages else no_text

    @cached_property
    def _chunker(self) -> Any:
        return sentence_chunker(self.config.words)


def read_document(path: Path, folder: Path) -> Document:
    """Text of a document, as Markdown where it has a structure.

    The title is that of an HTML page, else the first heading of level 1, else the file's name.

    Raises:
        RecordError: a text file that is not UTF-8.
        Exception: the file is broken; whatever its parser raises.
    """
    suffix, title = path.suffix.lower(), None
    if suffix in PLAIN:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(not_utf8(error), path=path) from error
    else:
        import markitdown
        import markitdown.converters

        # One converter, chosen by the suffix: `MarkItDown` itself would pass a broken PDF off as plain text.
        converter = getattr(markitdown.converters, CONVERTERS[suffix])()
        with path.open("rb") as stream:
            found = converter.convert(stream, markitdown.StreamInfo(extension=suffix))
        text, title = found.markdown, found.title
    heading = None if suffix == ".txt" else _HEADING.search(text)
    title = (title or "").strip() or (heading[1] if heading else path.stem)
    return Document(source=path.relative_to(folder).as_posix(), title=title, text=text)


def sentence_chunker(words: int) -> Any:
    """A `chonkie.SentenceChunker` that counts words as `count_words` does."""
    from chonkie import SentenceChunker

    # chonkie 1.0 fills a chunk up to, but excluding, `chunk_size`
    return SentenceChunker(count_words, chunk_size=words + 1, delim=_SENTENCE_ENDS)


def count_words(text: str) -> int:
    """Number of words; in scripts without spaces, each character is one.

    >>> count_words("Tokyo 東京!"), count_words("x" * 100)
    (4, 2)
    """
    return sum(1 for _ in _WORD.finditer(text))


def cut(document: Document, words: int, chunker: Any) -> Iterator[CutPassage]:
    """Passages of at most `words` words, in order, which together hold every word once.

    A sentence that is longer is cut between words.
    """
    # The converter of PDF files separates pages by form feeds.
    pages = "\f" in document.text and document.source.lower().endswith(".pdf")
    number = 0
    for chunk in chunker.chunk(document.text) if document.text.strip() else ():
        for start, end in _spans(document.text, chunk.start_index, chunk.end_index, words):
            text = document.text[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if start >= end:
                continue
            # Only the passage is cleaned: positions count the characters of the document as it is.
            text = document.text[start:end].replace("\r\n", "\n").replace("\f", "\n")
            place: dict[str, Any] = {"source": document.source, "start": start, "end": end}
            if pages:
                place["page"] = document.text.count("\f", 0, start) + 1
            identifier, contents = passage_fields(
                {"id": f"{document.source}#{number}", "title": document.title, "text": text}
            )
            yield CutPassage(id=identifier, contents=contents, metadata=document.metadata | place)
            number += 1


def _spans(text: str, start: int, end: int, words: int) -> Iterator[tuple[int, int]]:
    """The part of a text, or pieces of `words` words if it has more."""
    starts = [found.start() for found in _WORD.finditer(text, start, end)][::words]
    yield from zip([start, *starts[1:]], [*starts[1:], end], strict=True)
