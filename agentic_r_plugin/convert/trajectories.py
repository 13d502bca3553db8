"""`agentic-r convert trajectories`: other agents' logs as trajectories, so that data construction works on them.

The forms of logs are those of `logs`. From Python, `trajectory` makes the record from any other source.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin.answers import exact_match, f1
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, setting
from agentic_r_plugin.convert.hub import HubConfig, push_file
from agentic_r_plugin.convert.logs import TEXT_FIELDS, Log, Step, read_log
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.convert.passages import PassageFinder
from agentic_r_plugin.errors import RecordError, SearchError
from agentic_r_plugin.field_values import Row
from agentic_r_plugin.protocol import Finished, Search
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.records import Passage, Question, ScoredPassage, StopReason, Trajectory, Turn, text_id
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.wire import decode_hit
from agentic_r_plugin.storage.claim import companion
from agentic_r_plugin.storage.lookup import HashSet, KeyedRecords, key_hash
from agentic_r_plugin.store import atomic_path, dump_line, read_lines, shards, write_records
from agentic_r_plugin.tags import TagProtocol, search_r1, with_tags


@dataclass(frozen=True, kw_only=True)
class ConvertTrajectoriesConfig(HubConfig):
    """Write other agents' logs as trajectories."""

    in_: str = setting("log file, or a folder of them", BY_CONTENTS)
    out: str = setting("trajectories file to write", FREE)
    corpus: str = setting("corpus in which the passages are found by id or text", BY_CONTENTS)
    questions: str = setting(
        "questions with gold answers, joined by id or text; empty: from the log", BY_CONTENTS, default=""
    )
    format: str = field(default="", metadata={**FORMAT, **LATER})
    protocol: str = setting("registered agent_protocol to write them in", default="search_r1")


def trajectory(
    question: Question,
    steps: Iterable[Step],
    answer: str | None,
    *,
    reasoning: str = "",
    protocol: TagProtocol = search_r1,
    finder: PassageFinder | None = None,
) -> Trajectory:
    """The record of an agent that searched in `steps` and then answered.

    Args:
        steps: (reasoning, query, passages) of each search.
        answer: None if there is none.
        reasoning: before the answer.
        protocol: the form of `Trajectory.text`, with which `candidates` and `correctness` must be run.
        finder: finds the passages in the corpus; None keeps them as they are.

    Raises:
        RecordError: no query, a passage without text, or words that the protocol's tags make ambiguous.
    """
    text, found, queries = "", [], []
    for thought, query, passages in steps:
        hits = _found(passages, finder)
        text += protocol.write(thought, protocol.search_tag, query.strip())
        text += protocol.render([hit.passage for hit in hits])
        found.append(hits)
        queries.append(query.strip())
    if answer is not None:
        text += protocol.write(reasoning, protocol.answer_tag, answer.strip())
    record = _record(question, text, protocol, lambda number, _: found[number])
    # The stages will read the text, not the log: words that look like tags would change queries or answer.
    read = ([turn.query for turn in record.turns], record.answer)
    if read != (queries, answer.strip() if answer is not None else None):
        raise RecordError(
            f"the text in the form of agent protocol {protocol.name!r} is not read as it was meant: expected queries "
            f"and answer {queries}, {answer!r}, found {read[0]}, {read[1]!r}; do they hold its tags?"
        )
    return record


def trajectory_from_text(
    question: Question, text: str, *, protocol: TagProtocol = search_r1, finder: PassageFinder | None = None
) -> Trajectory:
    """The record of what model and environment wrote after the prompt, in the protocol's form; the text is kept.

    Raises:
        RecordError: neither a search nor an answer of this protocol.
    """

    def shown(number: int, block: str) -> list[Hit]:
        read = protocol.read_block(block) or ([("", block.strip())] if block.strip() else [])
        return _found([Passage(id="", title=title, text=text) for title, text in read], finder)

    record = _record(question, text, protocol, shown)
    if not record.turns and record.answer is None:
        raise RecordError(f"neither a search nor an answer of agent protocol {protocol.name!r} in {text[:80]!r}")
    return record


def _record(question: Question, text: str, protocol: TagProtocol, shown: Callable[[int, str], list[Hit]]) -> Trajectory:
    *exchanges, (rest, _) = protocol.exchanges(text)
    turns = []
    for number, (written, block) in enumerate(exchanges):
        # Malformed attempts before a correction are not part of the turn that searched.
        action = protocol.parse(written.rpartition(protocol.correction)[2])
        if not isinstance(action, Search):
            raise RecordError(f"search {number + 1}: expected a query, found {written[-80:]!r}")
        passages = tuple(ScoredPassage(id=hit.passage.id, score=hit.score) for hit in shown(number, block or ""))
        turns.append(Turn(turn=number + 1, reasoning=action.reasoning, query=action.query, passages=passages))
    last = protocol.parse(rest.rpartition(protocol.correction)[2])
    answer = last.answer if isinstance(last, Finished) else None
    # Why an agent stopped without an answer is not in its log: after a search it had no turn left.
    stopped = StopReason.MALFORMED if rest.strip() and not isinstance(last, Search) else StopReason.MAX_TURNS
    return Trajectory(
        id=question.id,
        question=question.question,
        golden_answers=question.golden_answers,
        turns=tuple(turns),
        answer=answer,
        stop_reason=stopped if answer is None else StopReason.ANSWERED,
        em=int(exact_match(answer, question.golden_answers)),
        f1=f1(answer, question.golden_answers),
        text=text,
        malformed_turns=text.count(protocol.correction),
    )


def _found(passages: Iterable[Any], finder: PassageFinder | None) -> list[Hit]:
    hits = []
    for rank, item in enumerate(passages):
        hit = item if isinstance(item, Hit) else _hit(item, f"passage {rank + 1}")
        passage = finder.find(hit.passage) if finder is not None else hit.passage
        if passage is None or not passage.id:
            passage = Passage(id=text_id(hit.passage.contents), title=hit.passage.title, text=hit.passage.text)
        hits.append(Hit(passage=passage, score=hit.score))
    return hits


def _hit(item: Any, where: str) -> Hit:
    if isinstance(item, Passage):
        return Hit(passage=item, score=0.0)
    if isinstance(item, Mapping) and "document" not in item:
        text = next((item[name] for name in TEXT_FIELDS if isinstance(item.get(name), str)), "")
        item = {**item, "text": text} if "contents" not in item else item
    try:
        return decode_hit(item, where)
    except SearchError as error:
        raise RecordError(str(error)) from error


class _Questions:
    """Questions by id and by text; without a file, each row's own."""

    def __init__(self, path: str, format: str, folder: Path) -> None:
        reader = partial(read_questions, format=format)
        self._by_id, self._by_text = (
            KeyedRecords(path, Question, key, many=True, folder=folder, reader=reader)
            for key in (lambda question: question.id, lambda question: _words(question.question))
        )
        self._path = path

    def find(self, log: Log, row: Row) -> Question:
        """The question of a log.

        An id is trusted if the user's message, where there is one, holds the question: logs number from zero again.

        Raises:
            RecordError: there is none, or (without a file) the row lacks id, question or a field's type is wrong.
        """
        whole, asked = "\n".join(log.asked), list[str]()
        if log.asked:
            _, marker, marked = whole.rpartition("Question:")
            question_text = marked if marker else log.asked[-1]
            # The whole text, the part after `Question:` (Search-R1's prompt), and that part up to a line or token end.
            asked = [whole, question_text, re.split(r"\n|<[|｜]", question_text.strip())[0]]
        if not self._path:
            own: dict[str, Any] = {"question": asked[-1] if asked else None} | {
                key: row[key] for key in row if key not in ("input", "output", "messages")
            }
            return Question.from_dict(own)
        for question in self._by_id.find(log.id) if log.id is not None else ():
            if not log.asked or _words(question.question) in _words(whole):
                return question
        for text in asked:
            for question in self._by_text.find(_words(text)):
                return question
        raise RecordError(
            f"no question with id {log.id!r} or text {asked[-1][:80] if asked else None!r} in {self._path}"
        )

    def close(self) -> None:
        """Close both lookups."""
        self._by_id.close()
        self._by_text.close()


def _words(text: str) -> str:
    return " ".join(text.split())


def run(config: ConvertTrajectoriesConfig, *, resume: bool = False) -> None:
    """Run the command `convert trajectories`.

    A record that cannot be read is kept apart in `OUT.errors.jsonl`; of several trajectories of a question the first is
    written.

    Raises:
        RecordError: no record could be read.
        BackendError: the upload failed; the file is written and whole.
    """
    inputs = {"in": config.in_, "corpus": config.corpus, "questions": config.questions}
    report = convert_once(config, lambda out: _write(config, out), inputs=inputs, resume=resume)
    rows = report["trajectories"]
    text = (
        f"# Trajectories of a search agent\n\n{rows} trajectories with {report['searches']} searches, written by "
        f"`agentic-r convert trajectories` in the form of agent protocol `{config.protocol}`: `text` is what model and "
        "environment wrote after the prompt, `turns` holds each query and the ids and scores of its passages."
    )
    push_file(config, text, rows=rows, task="question-answering", tags=["trajectories"])


def _write(config: ConvertTrajectoriesConfig, out: Path) -> dict[str, Any]:
    counts = Counter(
        dict.fromkeys(
            ("read", "trajectories", "without_golden_answers", "errors", "repeated", "searches", "calls_left_out"), 0
        )
    )
    first_error: str | None = None
    errors_file = companion(out, ".errors.jsonl")
    protocol = with_tags(config.protocol)
    with ExitStack() as stack:
        corpus = stack.enter_context(Corpus(config.corpus))
        finder = stack.enter_context(closing(PassageFinder(corpus, out.parent)))
        questions = stack.enter_context(closing(_Questions(config.questions, config.format, out.parent)))
        errors = stack.enter_context(stack.enter_context(atomic_path(errors_file)).open("wb"))
        seen = HashSet()

        def converted() -> Iterator[Trajectory]:
            nonlocal first_error
            for place, row in _rows(config.in_):
                counts["read"] += 1
                try:
                    if isinstance(row, RecordError):
                        raise row
                    if not isinstance(row, Mapping):
                        raise RecordError(f"expected a JSON object, found {type(row).__name__}")
                    log = read_log(row, protocol)
                    question = questions.find(log, row)
                    if (hashed := key_hash(question.id)) in seen:
                        counts["repeated"] += 1
                        continue
                    if log.text is not None:
                        record = trajectory_from_text(question, log.text, protocol=protocol, finder=finder)
                    else:
                        thought = log.reasoning
                        record = trajectory(
                            question, log.steps, log.answer, reasoning=thought, protocol=protocol, finder=finder
                        )
                except RecordError as error:
                    counts["errors"] += 1
                    first_error = first_error or (str(error) if isinstance(row, RecordError) else f"{place}: {error}")
                    errors.write(dump_line({"unit": place, "error": str(error)}))
                    continue
                # Only after success: a later log of the same question may take the place of one that could not be read.
                seen.add(hashed)
                counts["trajectories"] += 1
                counts["without_golden_answers"] += not record.golden_answers
                counts["searches"] += len(record.turns)
                counts["calls_left_out"] += log.left_out
                yield record

        write_records(out, converted())
        if not counts["trajectories"]:
            out.unlink()
            unread = f"none of {counts['read']} records could be read; first, {first_error}"
            raise RecordError(unread if counts["read"] else "no record in it", path=config.in_)
    if first_error is None:
        errors_file.unlink()
    missing, shown = finder.counts["not_found"], sum(finder.counts.values())
    if 2 * missing > shown:
        print(
            f"convert trajectories: the corpus lacks {missing} of {shown} passages that the agent was shown; is it "
            "the one that was searched?",
            file=sys.stderr,
        )
    return {**counts, "first_error": first_error, "passages": finder.counts}


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    for shard in shards(path):
        for number, row in read_lines(shard, keep_errors=True):
            yield f"{shard}:{number}", row
