"""`agentic-r experiment`: train retrievers in several ways from the data of one run and compare them.

A run folder of `iterate` holds agents and retrievers, and the candidates, relevance, correctness and groups of each
iteration. An experiment trains further retrievers on this data with the package's own stages and other settings, and
evaluates agents x retrievers x benchmarks in one matrix. Everything can be resumed. The run folder is only read.

With seeds and variants of a loop there is one experiment on the run of each, in `OUT/[VARIANT/]seed-N/`, and a matrix
over the seeds in `OUT/[VARIANT/]`. `run` names the run folders, with `{seed}` and `{variant}` in it. With `loop`, a run
that is missing or unfinished is made by `iterate`.

| in the folder of one experiment | contents |
|---|---|
| `benchmarks/NAME/` | links to the run's benchmark and to others (`corpus.jsonl` also to a packed corpus); worlds |
| `retrievers/NAME/` | data files that differ from the run's, and `retriever/` |
| `rerankers/NAME/` | a trained reranker |
| `index/NAME/BENCHMARK/` | the benchmark's corpus, encoded with the retriever |
| `evaluation/` | the matrix; `stop_rule/` holds the one on the split of the stop rule |
| `experiment.json`, `experiment.md` | for each retriever its groups, their cost and its exact match |
"""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin import iterate
from agentic_r_plugin.comparison.benchmarks import Benchmarks
from agentic_r_plugin.comparison.evaluation import Evaluation
from agentic_r_plugin.comparison.forecast import forecast
from agentic_r_plugin.comparison.retrievers import Retrievers
from agentic_r_plugin.comparison.settings import ExperimentConfig, parts
from agentic_r_plugin.comparison.source import SourceRun
from agentic_r_plugin.comparison.summary import summarize
from agentic_r_plugin.config import save_config
from agentic_r_plugin.evaluation import aggregate
from agentic_r_plugin.loop.checks import check_settings
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.storage.claim import Output

__all__ = ["ExperimentConfig", "compare", "run"]


def run(config: ExperimentConfig, *, resume: bool = False) -> None:
    """Run the command `experiment`.

    Raises:
        AgenticRError: as `iterate.run`, `compare` and `aggregate.run`; finished parts are kept.
    """
    found = list(parts(config))
    for part in found:
        if part.loop is not None:
            check_settings(Phases(part.loop))
    if config.loop or config.dry_run:
        print(forecast(found), flush=True)
    if config.dry_run:
        for part in found:
            # The models and data of a run that is still to be made are not there yet.
            if part.loop is None or Path(part.experiment.run, "done.json").is_file():
                _composed(part.experiment)
        return
    for part in found:
        if part.loop is not None:
            iterate.run(part.loop, resume=True)
    for part in found:
        # the folder of a series is shared by its parts, so only a single experiment can be new
        compare(part.experiment, resume=resume or len(found) > 1)
    if len(config.seeds) > 1:
        for variant in dict.fromkeys(part.variant for part in found):
            folders = [part.experiment.out for part in found if part.variant == variant]
            out = str(Path(config.out) / variant)
            aggregate.run(aggregate.AggregateConfig(out=out, runs=folders), resume=True)


def compare(config: ExperimentConfig, *, resume: bool = False) -> None:
    """Make and compare the retrievers of an experiment on one run.

    Raises:
        OutputExistsError: the folder exists and `resume` is off.
        ConfigError: a setting is wrong, or the run folder lacks a part that is needed.
        ManifestMismatchError: an existing output was made from another run or with other settings.
        AgenticRError: a stage failed; finished stages are kept.
    """
    out = Path(config.out)
    benchmarks, retrievers, evaluation = _composed(config)
    # Retrievers, benchmarks and agents may be added later; what each was made from is recorded with it.
    output = Output(out=out, made_from={"iteration": config.iteration}, done="experiment.json", folder=True)
    with output.claim(resume=resume) as held:
        held.begin()
        save_config(config, out / "config.yaml")
        benchmarks.gather()
        evaluation.check_inputs()
        evaluation.compare(retrievers.make())
        held.finish(summarize(retrievers))


def _composed(config: ExperimentConfig) -> tuple[Benchmarks, Retrievers, Evaluation]:
    """Compose every step of an experiment, and check that the run holds what they need."""
    benchmarks = Benchmarks(config, SourceRun(config.run, config.iteration))
    retrievers, evaluation = Retrievers(config, benchmarks), Evaluation(config, benchmarks)
    retrievers.check()
    evaluation.check_agents()
    benchmarks.check()
    return benchmarks, retrievers, evaluation
