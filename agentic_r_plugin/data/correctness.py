"""Correctness: does the agent answer correctly when it continues from one candidate alone? (method sections 4 and 4a)

Rolling out every candidate dominates the cost of the method. With relevance scores, only candidates that can become a
positive are rolled out: those at or above the relevance threshold, in descending order of relevance. The paper's rule
takes one positive, so a query is done at its first correct candidate. The released code also takes ties, so each level
of equal relevance is rolled out as a whole. The training groups are byte-identical to those of an exhaustive run,
unless a model refuses a request: pruning never sends some of them.

All queries of a batch advance together: the first candidate of every query, then the second candidate of the queries
without a success, and so on. One candidate per query and step needs the fewest rollouts, and the batch over queries
keeps the model busy. `tests/benchmarks/pruning.py` compares this with whole levels and with all candidates.

Not in the paper: `method=likelihood` replaces rollouts by the likelihood of the gold answer (`data.likelihood`): the
candidate of highest likelihood counts as correct if it makes the answer more likely than an information block without
passages. `order=likelihood` rolls out, but tries candidates of equal relevance in falling likelihood; of these, the
first correct one in that order becomes the positive. `tests/benchmarks/likelihood.py` compares both with rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin.answers import exact_match
from agentic_r_plugin.backends import LLMSpec, SearchSpec, open_llm, open_search
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, setting
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.candidates import check_protocol
from agentic_r_plugin.data.continuations import Continuations
from agentic_r_plugin.data.inputs import QueryFiles, query_units
from agentic_r_plugin.data.likelihood import by_likelihood, in_order_of_likelihood
from agentic_r_plugin.data.selection import (
    BELOW_THRESHOLD,
    NO_RELEVANCE,
    SelectionRule,
    preset_rule,
    rollout_order,
    tie_levels,
)
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, Unit, for_workers, run_stage
from agentic_r_plugin.errors import ConfigError, RecordError, RequestRefusedError
from agentic_r_plugin.protocol import Limits, load_protocol
from agentic_r_plugin.records import Candidates, Correctness, Passage
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.storage.table import UnitResult

NO_GOLD_ANSWER = "no_gold_answer"


@dataclass(frozen=True, kw_only=True)
class CorrectnessConfig:
    """Let the agent continue from each candidate alone, and compare its answers with the gold answers."""

    candidates: str = setting("candidates file", BY_CONTENTS)
    out: str = setting("correctness file to write", FREE)
    corpus: str = setting("corpus of the candidates", BY_CONTENTS)
    relevance: str = setting("relevance file, for exact pruning", BY_CONTENTS, default="")
    exhaustive: bool = setting("roll out every candidate; needs no relevance", default=False)
    llm: LLMSpec = setting("the agent", default_factory=LLMSpec)
    search: SearchSpec = setting("its retriever", default_factory=SearchSpec)
    protocol: str = setting("registered agent_protocol", default="search_r1")
    protocol_options: dict[str, Any] = setting(
        "options of the protocol that differ from its own", LATER, default_factory=dict
    )
    limits: Limits = setting("how far a trajectory may go", default_factory=Limits)
    topk: int = setting("passages shown for a later search", default=3)
    threshold: int = setting("candidates of less relevance are not rolled out", default=60)
    preset: str = setting(
        "prune for these groups: paper, or released_code (serves both, with more rollouts)", default="paper"
    )
    method: str = setting(
        "rollout, or likelihood: of the gold answer, without a rollout (ours)", LATER, default="rollout"
    )
    order: str = setting(
        "of rollouts of equal relevance: retrieval, or likelihood of the gold answer (ours)", LATER, default="retrieval"
    )
    max_turn: int = setting("leave out later turns (the released code: 4); 0: none", default=0)
    num_candidates: int = setting(
        "leave out queries with another number of candidates (released code: 20); 0: none", default=0
    )
    batch_size: int = setting("queries worked on at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def check(self) -> None:
        """Raise ConfigError if a value is out of range, or unless one of `relevance` and `exhaustive` is given."""
        if self.exhaustive == bool(self.relevance):
            raise ConfigError("correctness: give either --relevance FILE, for exact pruning, or --exhaustive")
        check_least(self, "correctness.", max_turn=0, num_candidates=0)
        for name, known in (("method", ("rollout", "likelihood")), ("order", ("retrieval", "likelihood"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"correctness.{name}: expected {' or '.join(known)}, found {getattr(self, name)!r}")
        if self.order == "likelihood" and (self.method != "rollout" or self.rule().whole_levels):
            raise ConfigError(
                "correctness.order=likelihood: it orders rollouts up to the first correct one; expected method=rollout "
                "and preset=paper"
            )
        self.rule()

    def rule(self) -> SelectionRule:
        """The selection rule of the groups that candidates are pruned for.

        Raises:
            ConfigError: an unknown preset.
        """
        return preset_rule(self.preset, threshold=self.threshold)


@dataclass
class CorrectnessCost(Cost):
    """Cost of the stage and savings by pruning: candidates = rollouts + reused + pruned."""

    candidates: int = 0
    pruned: int = 0


def by_rollout(
    queries: Iterable[tuple[Candidates, Sequence[Sequence[str]]]], continuations: Continuations
) -> Iterator[list[Correctness] | RequestRefusedError]:
    """Correctness of each query's candidates, in retrieval order; candidates that were not needed are left out. If the
    model or the retriever refuses a candidate, the query yields that refusal, because its winner is unknown.

    All queries advance in step, so that the model gets large batches.

    Args:
        queries: each query with its steps, lists of candidates (passage ids); it is done after a step with a success.

    Raises:
        BackendError, SearchError, RecordError: as `Continuations.run`.
    """
    queries = list(queries)
    found: list[dict[str, Correctness]] = [{} for _ in queries]
    refused: dict[int, RequestRefusedError] = {}
    depth, active = 0, [index for index, (_, steps) in enumerate(queries) if steps]
    while active:
        places = [(index, passage) for index in active for passage in queries[index][1][depth]]
        outcomes = continuations.run([(queries[index][0], passage) for index, passage in places])
        correct: set[int] = set()
        for (index, passage), outcome in zip(places, outcomes, strict=True):
            query = queries[index][0]
            if outcome.refusal is not None:
                # The refused candidate might have been the winner, so no result of this query can be trusted.
                refused.setdefault(index, RequestRefusedError(outcome.refusal))
                continue
            em = int(exact_match(outcome.answer, query.golden_answers))
            if em:
                correct.add(index)
            found[index][passage] = Correctness(
                id=query.id,
                turn=query.turn,
                passage_id=passage,
                em=em,
                answer=outcome.answer,
                searches=outcome.searches,
            )
        depth += 1
        # A success ends a query only after the whole step, so that tied candidates of a level are all judged.
        ended = correct | refused.keys()
        active = [index for index in active if index not in ended and len(queries[index][1]) > depth]
    for index, ((query, _), records) in enumerate(zip(queries, found, strict=True)):
        # In retrieval order, whatever the order of the rollouts was.
        yield refused.get(index) or [records[passage.id] for passage in query.passages if passage.id in records]


def steps_of(query: Candidates, config: CorrectnessConfig, scores: Mapping[str, int] | None) -> list[list[str]] | str:
    """The candidates of a query to roll out, step by step, or the reason why there are none.

    Args:
        scores: relevance of the candidates; None when the query has none.

    Raises:
        RecordError: the relevance scores belong to other candidates.
    """
    if not query.golden_answers:
        return NO_GOLD_ANSWER
    passages = [passage.id for passage in query.passages]
    if config.max_turn and query.turn > config.max_turn:
        return "turn_left_out"
    if not passages or (config.num_candidates and len(passages) != config.num_candidates):
        return "other_number_of_candidates"
    # Without relevance there is no order to stop early in: all candidates form one step.
    if config.exhaustive:
        return [passages]
    if scores is None:
        return NO_RELEVANCE
    # All candidates at or above the threshold: their likelihoods are compared before any of them is rolled out.
    if "likelihood" in (config.method, config.order):
        return tie_levels(passages, scores, config.threshold) or BELOW_THRESHOLD
    return rollout_order(passages, scores, config.rule()) or BELOW_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class CorrectnessTask:
    """One query, the steps of its candidates (or the reason why it has none), and the passages of those candidates."""

    query: Candidates
    steps: list[list[str]] | str
    passages: dict[str, Passage]


class _Shown(dict[str, Passage]):
    """The passages of a batch of tasks."""

    def by_id(self, identifier: str) -> Passage:
        return self[identifier]


class CorrectnessWorker(StageWorker):
    """Rolls out the candidates of batches of queries; holds the agent and its retriever."""

    cost: CorrectnessCost

    def __init__(self, config: CorrectnessConfig) -> None:
        super().__init__(CorrectnessCost())
        self.config = config
        self._llm = self.models.enter_context(open_llm(config.llm))
        self._search = self.models.enter_context(open_search(config.search))
        self._continuations = Continuations(
            self._llm,
            self._search,
            _Shown(),
            protocol=load_protocol(config.protocol, config.protocol_options),
            limits=config.limits,
            topk=config.topk,
            cost=self.cost,
        )

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of agent and retriever."""
        return {"agent": self._llm.fingerprint(), "retriever": self._search.fingerprint()}

    def work(self, batch: Sequence[CorrectnessTask]) -> list[UnitResult]:
        """Correctness of the candidates that were needed."""
        # Tasks carry their passages, so a worker (perhaps on another machine) does not open the corpus.
        self._continuations.passages = _Shown(
            {identifier: passage for task in batch for identifier, passage in task.passages.items()}
        )
        # Queries that are dropped keep an empty plan, so that plans and tasks stay aligned.
        plans = [(task.query, [] if isinstance(task.steps, str) else task.steps) for task in batch]
        if self.config.order == "likelihood":
            plans = in_order_of_likelihood(plans, self._continuations)
        found = by_likelihood if self.config.method == "likelihood" else by_rollout
        outcomes = []
        for task, records in zip(batch, found(plans, self._continuations), strict=True):
            if isinstance(records, RequestRefusedError):
                outcomes.append(UnitResult.refused(records))
                continue
            self.cost.candidates += len(task.query.passages)
            self.cost.pruned += len(task.query.passages) - len(records)
            reason = task.steps if isinstance(task.steps, str) else None
            outcomes.append(UnitResult(records=tuple(records), dropped=reason))
        return outcomes


def _labelled_units(path: str) -> Iterator[Unit[Candidates]]:
    """The queries of a candidates file; those without gold answers are dropped later.

    Raises:
        RecordError: no query has gold answers; raised at the end.
    """
    unit, labelled = None, False
    for unit in query_units(path):
        labelled = labelled or bool(unit.item.golden_answers)
        yield unit
    if unit is not None and not labelled:
        # The input is read to its end before any model is loaded, so this costs no rollout.
        raise RecordError("no question has golden answers, which correctness compares with", path=path)


def run(config: CorrectnessConfig, *, resume: bool = False) -> None:
    """Run the command `correctness`."""
    config.check()
    check_protocol("correctness", config.candidates, config.protocol)
    files = QueryFiles(Path(config.out).parent, relevance=config.relevance)
    # The index folder of the agent's retriever may hold a table of this corpus, which saves a full scan.
    with Corpus(config.corpus, table=config.search.index) as corpus:

        def prepare(query: Candidates) -> CorrectnessTask:
            steps = steps_of(query, config, files.relevance(query))
            wanted = [] if isinstance(steps, str) else [passage for step in steps for passage in step]
            return CorrectnessTask(
                query=query, steps=steps, passages={identifier: corpus.by_id(identifier) for identifier in wanted}
            )

        stage = Stage(
            name="correctness",
            config=config,
            inputs={"candidates": Path(config.candidates), **files.paths},
            models={"corpus": corpus.fingerprint()},
            record=Correctness,
            units=lambda: _labelled_units(config.candidates),
            prepare=prepare,
            sides=files.opened,
            worker=partial(CorrectnessWorker, for_workers(config)),
            batch_size=config.batch_size,
        )
        run_stage(stage, resume=resume)
