"""Training groups: one positive and its negatives per query (method section 4, step 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, setting
from agentic_r_plugin.data.inputs import QueryFiles, query_units
from agentic_r_plugin.data.selection import (
    SelectionRule,
    SelectionSettings,
    SelectionTask,
    check_scored,
    preset_rule,
    selection_named,
)
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, run_stage
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.records import Candidates, Group
from agentic_r_plugin.storage.claim import companion
from agentic_r_plugin.storage.table import UnitResult
from agentic_r_plugin.store import file_fingerprint, read_json


@dataclass(frozen=True, kw_only=True)
class GroupsConfig(SelectionSettings):
    """Pick the positive and the negatives of every query."""

    REMOVED: ClassVar[Mapping[str, Any]] = {"drop_duplicate_queries": False, "drop_duplicate_passages": False}

    candidates: str = setting("candidates file", BY_CONTENTS)
    relevance: str = setting("relevance file", BY_CONTENTS, default="")
    correctness: str = setting("correctness file", BY_CONTENTS, default="")
    trajectories: str = setting("trajectories file, for the preset opened", BY_CONTENTS, LATER, default="")
    out: str = setting("groups file to write", FREE)
    preset: str = setting(
        "registered selection: paper; released_code: up to 3 tied positives, further ties left out; "
        "opened: passages that the agent opened are positives",
        default="paper",
    )
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def rule(self) -> SelectionRule:
        """The selection rule of these settings.

        Raises:
            ConfigError: an unknown preset, or settings that contradict each other.
        """
        return preset_rule(self.preset, **{item.name: getattr(self, item.name) for item in fields(SelectionSettings)})

    def files(self) -> dict[str, str]:
        """Score files that the rule needs, by role; the path is empty if none was given."""
        rule = self.rule()
        wanted = {"relevance": rule.use_relevance, "correctness": rule.use_correctness, "trajectories": True}
        needs = selection_named(self.preset).needs
        return {role: getattr(self, role) for role, on in wanted.items() if on and role in needs}

    def check(self) -> None:
        """Raise ConfigError if settings contradict each other or a required file is missing."""
        for role, path in self.files().items():
            if not path:
                way_out = "" if role == "trajectories" else f", or switch it off with --no-use-{role}"
                raise ConfigError(f"groups: no --{role} file; give one{way_out}")


class GroupsWorker(StageWorker):
    """Selects the groups of batches of queries."""

    def __init__(self, preset: str, rule: SelectionRule) -> None:
        super().__init__()
        self.pick, self.rule = selection_named(preset).pick, rule

    def work(self, batch: Sequence[SelectionTask]) -> list[UnitResult]:
        """The groups of each query, or the reason why it has none."""
        picked = [self.pick(task, self.rule) for task in batch]
        return [UnitResult(dropped=one) if isinstance(one, str) else UnitResult(records=tuple(one)) for one in picked]


def check_pruned(rule: SelectionRule, pruned_for: SelectionRule) -> None:
    """Check that correctness pruned for one rule covers every candidate that another rule needs.

    Args:
        rule: the rule that selects the groups.
        pruned_for: the rule that decided which candidates were rolled out.

    Raises:
        ConfigError: candidates that `rule` needs were not rolled out.
    """
    if not rule.use_relevance:
        raise ConfigError(
            "groups.use_relevance=false: without relevance the correctness of every candidate is needed; "
            "set correctness.exhaustive=true"
        )
    if rule.threshold < pruned_for.threshold:
        raise ConfigError(
            f"groups.threshold={rule.threshold}: below correctness.threshold={pruned_for.threshold}, so the "
            "correctness of candidates between the two is not known"
        )
    if rule.whole_levels and not pruned_for.whole_levels:
        raise ConfigError(
            f"groups: this preset takes up to {rule.max_positives} tied candidates, but the correctness was made for "
            "the paper's rule, which stops at the first correct one; make it with correctness.preset=released_code "
            "(groups of the paper's rule can be made from that, too)"
        )


def _check_correctness(config: GroupsConfig, rule: SelectionRule) -> SelectionRule:
    """Check against the manifest next to the correctness file, if any, that the rule's candidates were rolled out.

    Returns the rule, or for correctness in order of likelihood the rule that takes the tie that it found first.

    Raises:
        ConfigError: it was pruned more than the rule allows.
        ManifestMismatchError: it was pruned with another relevance file, so queries would lack rollouts.
    """
    path = Path(config.correctness)
    manifest = companion(path, ".manifest.json")
    if not manifest.is_file():
        return rule
    of_correctness = read_json(manifest)
    made_from = of_correctness["made_from"]
    if "exhaustive" not in made_from:
        raise ConfigError(
            f"correctness: {path} was written by another command, as {manifest.name} says; give the output of "
            "agentic-r correctness (were --relevance and --correctness swapped?)"
        )
    if made_from.get("order") == "likelihood":
        if rule.whole_levels:
            raise ConfigError(
                "groups: this preset takes tied candidates, but the correctness was made with order=likelihood, which "
                "stops at the first correct one; make it with order=retrieval"
            )
        if made_from["exhaustive"] and rule.use_relevance:
            raise ConfigError(
                "groups: the correctness was made with exhaustive=true and order=likelihood, which stops at the first "
                "correct candidate of any relevance; set groups.use_relevance=false, or make it with a relevance file"
            )
        rule = replace(rule, any_of_ties=True)
    # Not pruned by relevance, so threshold and preset need no check.
    if made_from["exhaustive"]:
        return rule
    # Files without a preset come from a version that always rolled out whole levels.
    check_pruned(rule, preset_rule(made_from.get("preset", "released_code"), threshold=made_from["threshold"]))
    # Relevance decided what was rolled out; other scores would need candidates that have no record here.
    if (pruned_by := made_from["input relevance"]) != (given := file_fingerprint(config.relevance)):
        raise ManifestMismatchError(
            f"{path} was made with the relevance file {of_correctness['config']['relevance']} ({pruned_by}), which "
            f"decided what was rolled out; {config.relevance} ({given}) differs, so run correctness again with it"
        )
    return rule


def run(config: GroupsConfig, *, resume: bool = False) -> None:
    """Run the command `groups`.

    Raises:
        ConfigError, ManifestMismatchError: the correctness was not made for this relevance and threshold.
    """
    config.check()
    rule = config.rule()
    files = QueryFiles(Path(config.out).parent, **config.files())
    if "correctness" in files.paths:
        rule = _check_correctness(config, rule)

    def prepare(query: Candidates) -> SelectionTask:
        relevance = files.relevance(query)
        if relevance is not None:
            # Checked here: a RecordError of `prepare` refuses this query alone, one of a worker ends the stage.
            check_scored([passage.id for passage in query.passages], relevance)
        return SelectionTask(
            query=query, relevance=relevance, correctness=files.correctness(query), trajectory=files.trajectory(query)
        )

    stage = Stage(
        name="groups",
        config=config,
        inputs={"candidates": Path(config.candidates), **files.paths},
        record=Group,
        units=lambda: query_units(config.candidates),
        prepare=prepare,
        sides=files.opened,
        worker=partial(GroupsWorker, config.preset, rule),
        batch_size=1024,  # each batch waits for the disk once, and selection itself is fast
    )
    run_stage(stage, resume=resume)
