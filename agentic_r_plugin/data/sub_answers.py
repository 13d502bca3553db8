"""Sub-answers: a judge names the information that each query of a trajectory looked for (method section 4, step 3).

Only judges (listwise, pointwise) use them; the embedded default does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.config import BY_CONTENTS, FREE, check_least, fingerprint, setting
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_list, unit_result
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, for_workers, record_units, run_stage
from agentic_r_plugin.errors import JudgeError
from agentic_r_plugin.records import SubAnswer, Trajectory
from agentic_r_plugin.storage.table import UnitResult

_PROMPT = "sub_answers"


@dataclass(frozen=True, kw_only=True)
class SubAnswersConfig:
    """Let a judge name the information that each query looked for."""

    in_: str = setting("trajectories file", BY_CONTENTS)
    out: str = setting("sub-answers file to write", FREE)
    llm: LLMSpec = setting("the judge", default_factory=LLMSpec)
    max_retries: int = setting("further attempts after a reply that is not as asked", default=3)
    max_tokens: int = setting("longest reply", default=512)
    max_error_share: float = setting("largest share of trajectories the judge may fail on", FREE, default=0.1)
    prompt: str = setting("own prompt file in place of sub_answers.txt", BY_CONTENTS, default="")
    batch_size: int = setting("trajectories judged at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def __post_init__(self) -> None:
        check_least(self, max_tokens=1, max_retries=0)


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
        """Sub-answers of each trajectory, or the judge's error; the judge gets all trajectories in one call."""
        searching = [trajectory for trajectory in batch if trajectory.turns]
        replies = iter(
            ask(
                self._judge,  # type: ignore[arg-type]
                [render(trajectory, self._prompt) for trajectory in searching],
                [partial(parse_sub_answers, num_queries=len(trajectory.turns)) for trajectory in searching],
                max_tokens=self.config.max_tokens,
                max_retries=self.config.max_retries,
                cost=self.cost,
            )
        )
        return [_result(trajectory, next(replies) if trajectory.turns else []) for trajectory in batch]


def _result(trajectory: Trajectory, reply: Sequence[str | None] | JudgeError) -> UnitResult:
    if isinstance(reply, JudgeError):
        return unit_result(reply)
    records = tuple(
        SubAnswer(id=trajectory.id, turn=turn.turn, query=turn.query, sub_answer=sub_answer)
        for turn, sub_answer in zip(trajectory.turns, reply, strict=True)
    )
    return UnitResult(records=records, dropped=None if records else "no_search")


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
