"""Sub-answers: a judge names the information that each query of a trajectory looked for (method section 4, step 3).

Only the listwise judge uses them; the embedded default does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.config import BY_CONTENTS, FREE, fingerprint, setting
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_list, unit_result
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, for_workers, record_units, run_stage
from agentic_r_plugin.errors import JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.records import SubAnswer, Trajectory
from agentic_r_plugin.storage.table import UnitResult

_PROMPT = "sub_answers"


@dataclass(frozen=True, kw_only=True)
class SubAnswersConfig:
    """Let a judge name what each query was after."""

    in_: str = setting("trajectories file", BY_CONTENTS)
    out: str = setting("sub-answers file to write", FREE)
    llm: LLMSpec = setting("the judge", default_factory=LLMSpec)
    max_retries: int = setting("further attempts after a reply that is not as asked", default=3)
    max_tokens: int = setting("longest reply", default=512)
    max_error_share: float = setting("largest share of trajectories the judge may fail on", FREE, default=0.1)
    prompt: str = setting("own prompt file in place of sub_answers.txt", BY_CONTENTS, default="")
    batch_size: int = setting("trajectories judged at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)


def name_sub_answers(
    trajectories: Iterable[Trajectory],
    judge: ChatBackend,
    *,
    max_retries: int = 3,
    max_tokens: int = 512,
    prompt: str | None = None,
    cost: Cost | None = None,
) -> Iterator[list[SubAnswer] | JudgeError]:
    """Sub-answers of each trajectory's queries, or the judge's error; all trajectories are judged in one call.

    Args:
        trajectories: one batch.
        judge: the model; its prompt holds the question, the gold answers and the whole trajectory.
        max_retries: further attempts after a reply without exactly one sub-answer per query.
        max_tokens: maximum length of a reply.
        prompt: text with placeholders; None uses the package's prompt.
        cost: updated in place, if given.

    Raises:
        BackendError: the judge's backend failed.
    """
    trajectories = list(trajectories)
    searching = [trajectory for trajectory in trajectories if trajectory.turns]
    prompt = prompt if prompt is not None else load_prompt(_PROMPT)
    replies = iter(
        ask(
            judge,
            [render(trajectory, prompt) for trajectory in searching],
            [partial(parse_sub_answers, num_queries=len(trajectory.turns)) for trajectory in searching],
            max_tokens=max_tokens,
            max_retries=max_retries,
            cost=cost if cost is not None else Cost(),
        )
        if searching
        else []
    )
    for trajectory in trajectories:
        reply = next(replies) if trajectory.turns else []
        yield reply if isinstance(reply, JudgeError) else _records(trajectory, reply)


def _records(trajectory: Trajectory, sub_answers: Sequence[str | None]) -> list[SubAnswer]:
    return [
        SubAnswer(id=trajectory.id, turn=turn.turn, query=turn.query, sub_answer=sub_answer)
        for turn, sub_answer in zip(trajectory.turns, sub_answers, strict=True)
    ]


def render(trajectory: Trajectory, prompt: str) -> str:
    """The prompt for one trajectory."""
    return fill(
        prompt,
        question=trajectory.question,
        golden_answers="; ".join(trajectory.golden_answers),
        queries="\n".join(f"{number}. {turn.query}" for number, turn in enumerate(trajectory.turns, start=1)),
        trajectory=trajectory.text,
        num_queries=len(trajectory.turns),
    )


def parse_sub_answers(reply: str, num_queries: int) -> list[str | None]:
    """One sub-answer per query; "Not Sure" and empty strings become None.

    Raises:
        JudgeError: no JSON list of exactly `num_queries` strings.

    >>> parse_sub_answers('["Jane Austen", "Not Sure"]', 2)
    ['Jane Austen', None]
    """
    found = parse_list(reply, num_queries)
    for item in found:
        if not isinstance(item, str):
            raise JudgeError(f"expected strings, found {item!r}: {reply[:200]!r}")
    return [None if item.strip().rstrip(".").lower() in ("not sure", "") else item.strip() for item in found]


class SubAnswersWorker(StageWorker):
    """Requests the sub-answers of batches of trajectories; holds the judge."""

    def __init__(self, config: SubAnswersConfig) -> None:
        super().__init__()
        self.config = config
        self._prompt = load_prompt(_PROMPT, config.prompt)
        self._judge = self.models.enter_context(open_llm(config.llm))

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of judge and prompt."""
        return {"judge": self._judge.fingerprint(), "prompt": fingerprint(self._prompt)}

    def work(self, batch: Sequence[Trajectory]) -> list[UnitResult]:
        """Sub-answers of each trajectory, or the judge's error."""
        named = name_sub_answers(
            batch,
            self._judge,  # type: ignore[arg-type]
            max_retries=self.config.max_retries,
            max_tokens=self.config.max_tokens,
            prompt=self._prompt,
            cost=self.cost,
        )
        return [
            unit_result(result)
            if isinstance(result, JudgeError)
            else UnitResult(records=tuple(result), dropped=None if result else "no_search")
            for result in named
        ]


def run(config: SubAnswersConfig, *, resume: bool = False) -> None:
    """Run the command `sub-answers`."""
    stage = Stage(
        name="sub-answers",
        config=config,
        inputs={"trajectories": Path(config.in_)},
        record=SubAnswer,
        units=lambda: record_units(config.in_, Trajectory, attrgetter("id")),
        worker=partial(SubAnswersWorker, for_workers(config)),
        batch_size=config.batch_size,
    )
    run_stage(stage, resume=resume)
