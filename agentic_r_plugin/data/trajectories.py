"""Trajectories: the agent answers every training question (method section 4, step 1)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from agentic_r_plugin.backends import LLMSpec, SearchSpec, open_llm, open_search
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, setting
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, Unit, for_workers, run_stage
from agentic_r_plugin.errors import RequestRefusedError
from agentic_r_plugin.llm.base import LLMBackend, Sampling, check_sampling
from agentic_r_plugin.protocol import AgentProtocol, Limits, load_protocol
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.rollout import run_sessions, to_trajectory
from agentic_r_plugin.search.base import SearchBackend
from agentic_r_plugin.session import Session
from agentic_r_plugin.storage.table import UnitResult


@dataclass(frozen=True, kw_only=True)
class TrajectoriesConfig:
    """Let the agent answer every question, and write what it did."""

    in_: str = setting("questions file", BY_CONTENTS)
    format: str = field(default="", metadata=FORMAT)
    out: str = setting("trajectories file to write", FREE)
    llm: LLMSpec = setting("the agent", default_factory=LLMSpec)
    search: SearchSpec = setting("its retriever", default_factory=SearchSpec)
    protocol: str = setting("registered agent_protocol", default="search_r1")
    protocol_options: dict[str, Any] = setting(
        "options of the protocol that differ from its own", LATER, default_factory=dict
    )
    limits: Limits = setting("how far a trajectory may go", default_factory=Limits)
    topk: int = setting("passages shown for a search", default=3)
    temperature: float = setting("0 is greedy", default=0.0)
    seed: int = setting("of random_sample, and of the draw where the temperature is not 0", default=0)
    num_questions: int = setting("only the first N of the file; 0: all", default=0)
    random_sample: bool = setting("draw num_questions at random, in the file's order", default=False)
    batch_size: int = setting("questions answered at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def __post_init__(self) -> None:
        check_least(self, num_questions=0)
        check_sampling(self.temperature)


def answer_questions(
    questions: Iterable[Question],
    llm: LLMBackend,
    search: SearchBackend,
    *,
    protocol: AgentProtocol,
    limits: Limits,
    topk: int = 3,
    sampling: Sampling | None = None,
    cost: Cost | None = None,
) -> Iterator[Trajectory | RequestRefusedError]:
    """Answer all questions of a batch together.

    Yields per question, in order, its trajectory, or a refusal if its prompt, a later turn or a query is too long for
    the limits, the model or the retriever.

    Args:
        topk: passages shown per search.
        sampling: sampling parameters; None decodes greedily.
        cost: updated in place, if given.

    Raises:
        BackendError: the agent's backend failed.
        SearchError: the retriever failed.
    """
    questions = list(questions)
    sessions = [
        Session(protocol=protocol, codec=llm.codec, limits=limits, question=question.question) for question in questions
    ]
    run_sessions(sessions, llm, search, topk=topk, sampling=sampling or Sampling(), cost=cost)
    for session, question in zip(sessions, questions, strict=True):
        yield to_trajectory(session, question) if session.refusal is None else RequestRefusedError(session.refusal)


class TrajectoriesWorker(StageWorker):
    """Answers batches of questions; holds the agent and its retriever."""

    def __init__(self, config: TrajectoriesConfig) -> None:
        super().__init__()
        self.config = config
        self._llm = self.models.enter_context(open_llm(config.llm))
        self._search = self.models.enter_context(open_search(config.search))
        self._protocol = load_protocol(config.protocol, config.protocol_options)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of agent and retriever."""
        return {"agent": self._llm.fingerprint(), "retriever": self._search.fingerprint()}

    def work(self, batch: Sequence[Question]) -> list[UnitResult]:
        """Per question, its trajectory or the reason why it is refused."""
        config = self.config
        sampling = Sampling(temperature=config.temperature, seed=config.seed)
        found = answer_questions(
            batch, self._llm, self._search, protocol=self._protocol, limits=config.limits, topk=config.topk,
            sampling=sampling, cost=self.cost,
        )  # fmt: skip
        return [
            UnitResult.refused(one) if isinstance(one, RequestRefusedError) else UnitResult(records=(one,))
            for one in found
        ]


def chosen_questions(config: TrajectoriesConfig) -> Iterator[Question]:
    """The questions to answer, in file order."""
    read = partial(read_questions, config.in_, format=config.format)
    if not config.num_questions or not config.random_sample:
        yield from islice(read(), config.num_questions or None)
        return
    # Two passes over the file, so that its questions need not fit into memory.
    total = sum(1 for _ in read())
    drawn = frozenset(random.Random(config.seed).sample(range(total), min(config.num_questions, total)))
    yield from (question for place, question in enumerate(read()) if place in drawn)


def run(config: TrajectoriesConfig, *, resume: bool = False) -> None:
    """Run the command `trajectories`."""
    stage = Stage(
        name="trajectories",
        config=config,
        inputs={"questions": Path(config.in_)},
        record=Trajectory,
        units=lambda: (Unit(question.id, question) for question in chosen_questions(config)),
        worker=partial(TrajectoriesWorker, for_workers(config)),
        batch_size=config.batch_size,
    )
    run_stage(stage, resume=resume)
