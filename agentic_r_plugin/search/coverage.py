"""`agentic-r coverage`: can the corpus answer the benchmark at all, and how much of it does a retriever find?

For every question: whether a gold answer occurs anywhere in the corpus (as whole normalised words, the same rule as
answer recall), whether its gold documents are in the corpus, and at which rank the retriever finds them for the plain
question. A corpus that lacks documents (such as wiki-18) caps every retriever; report the cap with each result.

The shares of answers leave out questions without gold answers and those whose answers are yes, no or an article. The
shares of documents leave out questions without gold documents in their metadata (`gold_doc_ids`, or
`supporting_titles`). A question that the retriever refuses counts as not found; the report names it.

With `qrels` or `metrics`, ranx (extra `ranx`) computes retrieval metrics over the judged questions. `OUT.scores.json`
holds them for each question, `OUT.run.trec` the rankings.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from agentic_r_plugin.answers import contains_answer, is_closed, normalize, tokens
from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, deciding, setting
from agentic_r_plugin.errors import ConfigError, RecordError, SearchRefusedError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.records import Question, Record
from agentic_r_plugin.search import ranked
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest, search_each
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.storage.claim import Claim, Output, require_new
from agentic_r_plugin.store import atomic_path, check_suffix, file_fingerprint, read_json, write_json, write_records
from agentic_r_plugin.trec import run_lines, write_lines

log = logging.getLogger(__name__)

_ROWS, _QUESTIONS = 200_000, 256
"""Passages and questions between two resume points."""


@dataclass(frozen=True, kw_only=True)
class CoverageConfig:
    """Settings of `agentic-r coverage`."""

    questions: str = setting("questions file", BY_CONTENTS)
    format: str = field(default="", metadata=FORMAT)
    out: str = setting("one record per question; OUT.report.json and OUT.report.md hold the shares", FREE)
    index: str = setting("index folder of the retriever (short for search.index=)", BY_CONTENTS, default="")
    corpus: str = setting("corpus file, where it is not the index's own", BY_CONTENTS, default="")
    search: SearchSpec = setting("the retriever", default_factory=SearchSpec)
    topk: list[int] = setting("depths", default_factory=lambda: [3, 20, 100])
    max_questions: int = setting("only the first N; 0: all", default=0)
    qrels: dict[str, str] = setting(
        "name -> qrels of TREC or BEIR, for metrics; none: the gold documents", BY_CONTENTS, default_factory=dict
    )
    metrics: list[str] = setting(
        "retrieval metrics of ranx; with qrels recall@5, @100, @1000 and ndcg@10 unless others are named",
        LATER,
        default_factory=list,
    )

    def __post_init__(self) -> None:
        if not self.topk or min(self.topk) < 1:
            raise ConfigError(f"topk: expected depths of at least 1, found {self.topk}")
        if self.max_questions < 0:
            raise ConfigError(f"max_questions must not be below 0, found {self.max_questions}")

    def measured(self) -> Sequence[str]:
        """The retrieval metrics; empty: none."""
        return self.metrics or (ranked.METRICS if self.qrels else ())

    def depth(self) -> int:
        """Passages searched for each question."""
        return max(*self.topk, ranked.depth_of(self.measured()))

    def spec(self) -> SearchSpec:
        """Settings of the retriever, with `index` and `corpus` filled in."""
        own = self.search
        return replace(own, index=self.index or own.index, corpus=self.corpus or own.corpus)


@dataclass(frozen=True, kw_only=True)
class Coverage(Record):
    """What corpus and retriever hold for one question."""

    schema: ClassVar[str | None] = "coverage/1"

    id: str
    answer_in_corpus: bool | None
    """None if finding an answer would mean nothing (`answers.is_closed`)."""
    answer_rank: int | None
    """From 1: first passage with a gold answer; None if there is none within the largest depth."""
    gold: int
    """Gold documents that the metadata names."""
    gold_in_corpus: int
    gold_ranks: tuple[int, ...]
    """Ranks of those that were found within the largest depth."""


def run(config: CoverageConfig, *, resume: bool = False) -> None:
    """Measure coverage, write the results and print the report.

    Raises:
        OutputExistsError: the output exists and `resume` is off.
        ManifestMismatchError: the unfinished work belongs to other inputs.
        RecordError: broken questions or corpus.
        ConfigError: no corpus is named, the retriever cannot be opened, or ranx does not know a metric.
        SearchRefusedError: the retriever refuses every question; a resume asks it again.
    """
    out = Path(config.out)
    if not resume:
        require_new(out)
    check_suffix(out)
    questions = list(read_questions(config.questions, format=config.format))[: config.max_questions or None]
    if not questions:
        raise RecordError("no question", path=config.questions)
    judged = _judged(config, questions) if config.measured() else {}
    # Work is compared by the largest depth alone: the shares at smaller depths come from the same ranks.
    made_from = deciding(config) | {"questions": file_fingerprint(config.questions), "topk": config.depth()}
    made_from |= {f"qrels {name}": file_fingerprint(path) for name, path in config.qrels.items()}
    output = Output(out=out, made_from=made_from, done=".report.json", late=("fingerprint of ",))
    with output.claim(resume=resume) as held:
        if held.finished is not None:
            log.warning("%s is done already", out)
            shutil.rmtree(held.work, ignore_errors=True)  # left if a run was killed right after it had finished
            return
        spec = config.spec()
        with open_search(spec) as backend, _open_corpus(spec, backend) as corpus:
            opened = {"corpus": corpus.fingerprint(), "retriever": backend.fingerprint()}
            held.begin({f"fingerprint of {role}": value for role, value in opened.items()})
            report = _measure(config, held, questions, corpus, backend, judged)
        held.finish(report)
        shutil.rmtree(held.work)
    print(render(report))


def _measure(
    config: CoverageConfig,
    held: Claim,
    questions: Sequence[Question],
    corpus: Corpus,
    backend: SearchBackend,
    judged: Mapping[str, ranked.Qrels],
) -> dict[str, Any]:
    """Write the records and the report as Markdown; returns the report."""
    kept = partial(_kept, held.work)
    answered, titles = scan_corpus(corpus, questions, kept)
    ranks = find_ranks(backend, questions, config.depth(), kept, bool(judged))
    refused = {question.id: found[2] for question, found in zip(questions, ranks, strict=True) if found[2]}
    if len(refused) == len(questions):
        # A resume would otherwise read the refusals again instead of asking again.
        for path in held.work.glob(f"{_SEARCH}*.json"):
            path.unlink()
        raise SearchRefusedError(f"the retriever refused all {len(questions)} questions; first, {_first(refused)}")
    records = [
        _record(question, number in answered, titles, corpus, ranks[number])
        for number, question in enumerate(questions)
    ]
    report = summarize(records, config.topk) | {"refused": refused}
    if judged:
        scores, report["retrieval"] = _retrieval(config, held, questions, judged)
        write_json(held.output.path(".scores.json"), scores)
    write_records(held.out, records)
    with atomic_path(held.output.path(".report.md")) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return report


def _judged(config: CoverageConfig, questions: Sequence[Question]) -> dict[str, ranked.Qrels]:
    """Judgements of each set of qrels on these questions; without qrels, the documents that the questions name.

    Raises:
        ConfigError: ranx does not know a metric.
        RecordError: broken qrels, or none of these questions is judged.
    """
    ranked.check_metrics(config.measured())
    if config.qrels:
        found = {name: ranked.read_qrels(path, questions) for name, path in config.qrels.items()}
    else:
        found = {name: ranked.named_documents(name, questions) for name in ("gold", "evidence")}
        found = {name: qrels for name, qrels in found.items() if qrels or name == "gold"}
    for name, qrels in found.items():
        if not qrels:
            missing = "has a relevant document" if config.qrels else "names its gold documents; give qrels"
            raise RecordError(f"no question of {config.questions} {missing}", path=config.qrels.get(name))
    return found


def _retrieval(
    config: CoverageConfig, held: Claim, questions: Sequence[Question], judged: Mapping[str, ranked.Qrels]
) -> tuple[dict[str, list[Any]], dict[str, dict[str, float]]]:
    """(metrics of each question, their means by qrels); writes the run."""
    table: dict[str, list[Any]] = {}

    def run_file() -> Iterator[str]:
        for start in range(0, len(questions), _QUESTIONS):
            # Rankings are read back piece by piece, so memory holds scores only.
            rows = read_json(held.work / f"{_SEARCH}{start}.json")
            part = zip(questions[start : start + _QUESTIONS], rows, strict=True)
            rankings = {question.id: [(str(name), float(score)) for name, score in row[3]] for question, row in part}
            found = ranked.score_table(config.measured(), judged, rankings)
            columns: dict[str, Sequence[Any]] = {"id": list(rankings), **found}
            for column, values in columns.items():
                table.setdefault(column, []).extend(values)
            for question_id, ranking in rankings.items():
                yield from run_lines(question_id, ranking, config.spec().backend)

    write_lines(held.output.path(".run.trec"), run_file())
    means: dict[str, dict[str, float]] = {}
    for name, qrels in judged.items():
        # None is the score of a question without judgements, which the number of questions below leaves out, too.
        sums = {metric: sum(score or 0.0 for score in table[f"{name} {metric}"]) for metric in config.measured()}
        means[name] = {"questions": len(qrels)} | {metric: total / len(qrels) for metric, total in sums.items()}
    return table, means


def _open_corpus(spec: SearchSpec, backend: SearchBackend) -> Corpus:
    """The corpus that the retriever searches.

    Raises:
        ConfigError: no corpus is named (a remote service does not report its corpus file).
    """
    if spec.corpus:
        return Corpus(spec.corpus, table=spec.index)
    if (path := getattr(getattr(backend, "corpus", None), "path", None)) is None:
        raise ConfigError(f"search backend {spec.backend!r} names no corpus; set 'corpus' to the file it searches")
    return Corpus(path, table=spec.index)


def _kept(folder: Path, name: str, work: Callable[[], Any]) -> Any:
    """The result of a piece of work, from its file in the folder if it is there."""
    path = folder / f"{name}.json"
    if not path.is_file():
        write_json(path, work())
    # Read back even if it was just written, so that new and old results have the same types (JSON has no tuples).
    return read_json(path)


Kept = Callable[[str, Callable[[], Any]], Any]
"""(name, work) -> the result of `work`, computed now or read from an earlier run."""


class AnswerFinder:
    """Finds which of many answers a text contains, in one pass over its words; agrees with `answers.contains_answer`.

    >>> sorted(AnswerFinder([["Paris"], ["the Nile", "Amazon"]]).find("The River Nile, or the Amazon; not Parisian"))
    [1]
    """

    def __init__(self, answers: Sequence[Iterable[str]]) -> None:
        self._by_first_word: dict[str, list[tuple[list[str], int]]] = defaultdict(list)
        self._without_words: list[tuple[str, int]] = []
        for number, golden_answers in enumerate(answers):
            for answer in golden_answers:
                # By first word: a text is only compared with answers that begin with one of its words.
                if words := tokens(answer):
                    self._by_first_word[words[0]].append((words, number))
                else:
                    self._without_words.append((answer, number))

    def find(self, text: str) -> set[int]:
        """Numbers of the answers found."""
        words = tokens(text)
        found = {number for answer, number in self._without_words if contains_answer(text, answer)}
        for place, word in enumerate(words):
            for answer, number in self._by_first_word.get(word, ()):
                if words[place : place + len(answer)] == answer:
                    found.add(number)
        return found


def scan_corpus(corpus: Corpus, questions: Sequence[Question], kept: Kept) -> tuple[set[int], set[str]]:
    """(numbers of the questions with an answer in the corpus, normalised supporting titles found in the corpus)."""
    finder = AnswerFinder([() if is_closed(q.golden_answers) else q.golden_answers for q in questions])
    wanted = {title for question in questions for title in gold_titles(question)}
    answered: set[int] = set()
    titles: set[str] = set()

    def scan(start: int, stop: int) -> list[list[Any]]:
        found: set[int] = set()
        held: set[str] = set()
        for row in range(start, stop):
            passage = corpus[row]
            found |= finder.find(passage.contents)
            if wanted and (title := normalize(passage.title)) in wanted:
                held.add(title)
        return [sorted(found), sorted(held)]

    with tqdm(total=len(corpus), desc="corpus", unit="passage", mininterval=1.0) as progress:
        for start in range(0, len(corpus), _ROWS):
            stop = min(start + _ROWS, len(corpus))
            found, held = kept(f"corpus-{start}", partial(scan, start, stop))
            answered.update(found)
            titles.update(held)
            progress.update(stop - start)
    return answered, titles


Ranks = tuple[int | None, list[int], str | None]
"""First rank with an answer, ranks of the gold documents found, and why the retriever refused the question, if so."""

_SEARCH = "ranks-"
"""Name of the pieces of work that hold ranks."""


def find_ranks(
    backend: SearchBackend, questions: Sequence[Question], depth: int, kept: Kept, whole: bool = False
) -> list[Ranks]:
    """Ranks at which the retriever finds answers and gold documents for each plain question.

    Args:
        whole: whether the kept work also holds, as a fourth item, the ranking: passage ids with their scores.
    """

    def search(part: Sequence[Question]) -> list[tuple[Any, ...]]:
        hits = search_each(backend, [SearchRequest(query=question.question) for question in part], depth)
        ranks: list[tuple[Any, ...]] = []
        for question, found in zip(part, hits, strict=True):
            refused, found = (str(found), []) if isinstance(found, SearchRefusedError) else (None, found)
            ranking = ([(hit.passage.id, hit.score) for hit in found],) if whole else ()
            ranks.append((*_ranks(question, found), refused, *ranking))
        return ranks

    ranks: list[Ranks] = []
    with tqdm(total=len(questions), desc="search", unit="question", mininterval=1.0) as progress:
        for start in range(0, len(questions), _QUESTIONS):
            part = questions[start : start + _QUESTIONS]
            ranks += [tuple(row[:3]) for row in kept(f"{_SEARCH}{start}", partial(search, part))]
            progress.update(len(part))
    return ranks


def _ranks(question: Question, hits: Sequence[Hit]) -> tuple[int | None, list[int]]:
    passages, golden = [hit.passage for hit in hits], question.golden_answers
    ranks = (rank for rank, passage in enumerate(passages, start=1) if contains_answer(passage.contents, golden))
    answer = None if is_closed(golden) else next(ranks, None)
    ids, titles, found = gold_ids(question), gold_titles(question), []
    left = set(ids or titles)
    for rank, passage in enumerate(passages, start=1):
        if (name := passage.id if ids else normalize(passage.title)) in left:
            # Several passages can have a supporting title; the first one found counts.
            left.discard(name)
            found.append(rank)
    return answer, found


def gold_ids(question: Question) -> frozenset[str]:
    """Ids of a question's gold documents."""
    return frozenset(listed(question.metadata, "gold_doc_ids"))


def gold_titles(question: Question) -> frozenset[str]:
    """Normalised supporting titles, used if there are no gold ids."""
    if gold_ids(question):
        return frozenset()
    return frozenset(map(normalize, listed(question.metadata, "supporting_titles")))


def _record(question: Question, answered: bool, titles: set[str], corpus: Corpus, ranks: Ranks) -> Coverage:
    ids, wanted = gold_ids(question), gold_titles(question)
    return Coverage(
        id=question.id,
        answer_in_corpus=None if is_closed(question.golden_answers) else answered,
        answer_rank=ranks[0],
        gold=len(ids or wanted),
        gold_in_corpus=sum(name in corpus for name in ids) if ids else len(wanted & titles),
        gold_ranks=tuple(ranks[1]),
    )


def summarize(records: Sequence[Coverage], topk: Sequence[int]) -> dict[str, Any]:
    """Shares in 0..1 over the questions that they apply to; None if there is no such question.

    `answer`: a gold answer is found. `gold`: mean share of a question's gold documents found. `all_gold`: all found.
    """
    open_ = [item for item in records if item.answer_in_corpus is not None]
    with_gold = [item for item in records if item.gold]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    def row(answered: Sequence[bool], gold: Sequence[int]) -> dict[str, float | None]:
        parts = [found / item.gold for found, item in zip(gold, with_gold, strict=True)]
        return {"answer": mean(answered), "gold": mean(parts), "all_gold": mean([part == 1 for part in parts])}

    answered = [bool(item.answer_in_corpus) for item in open_]
    shares = {"corpus": row(answered, [item.gold_in_corpus for item in with_gold])}
    for depth in sorted(topk):
        answered = [item.answer_rank is not None and item.answer_rank <= depth for item in open_]
        shares[f"top {depth}"] = row(answered, [sum(rank <= depth for rank in item.gold_ranks) for item in with_gold])
    counts = {"questions": len(records), "answer": len(open_), "gold": len(with_gold)}
    return {"questions": counts, "shares": shares}


def _first(refused: dict[str, str]) -> str:
    return ": ".join(next(iter(refused.items())))


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    counts = report["questions"]
    lines = [
        f"{counts['questions']} questions; answers judged for {counts['answer']}, gold documents for {counts['gold']}.",
        "",
        "| within | answer | gold documents | all gold documents |",
        "|---|---|---|---|",
    ]
    for name, row in report["shares"].items():
        cells = ("-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("answer", "gold", "all_gold"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if retrieval := report.get("retrieval"):
        metrics = [name for name in next(iter(retrieval.values())) if name != "questions"]
        lines += ["", f"| qrels | questions | {' | '.join(metrics)} |", "|---" * (2 + len(metrics)) + "|"]
        for name, means in retrieval.items():
            cells = (f"{100 * means[metric]:.1f} %" for metric in metrics)
            lines.append(f"| {name} | {means['questions']} | {' | '.join(cells)} |")
    if refused := report.get("refused"):
        lines += ["", f"{len(refused)} questions were refused and count as not found: {', '.join(refused)}."]
        lines.append(f"First, {_first(refused)}")
    return "\n".join(lines) + "\n"
