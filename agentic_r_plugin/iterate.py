"""The loop (paper section 3.4, Algorithm 1): agent and retriever train each other, K times.

    agent, retriever = warm-started agent, off-the-shelf retriever
    for k in 1..K:
        agent     = PPO(agent, searching with retriever)
        groups    = construct(agent, retriever)
        retriever = contrastive training(retriever, groups)
        index     = encode(corpus, retriever)

Every phase is one of the package's commands on files in the run folder, so each can be run and inspected by hand:

| in RUN | contents |
|---|---|
| `config.yaml` | the resolved configuration; on resume, only settings that cannot change a result may differ |
| `.manifest.json` | the other settings; fingerprints of the given agent, retriever and questions (`storage.claim`) |
| `benchmark/` | the generated benchmark, if none was given |
| `iteration-0/index/` | the corpus, encoded with the first retriever |
| `iteration-K/agent/` | PPO run; the trained agent is in `agent/agent/` |
| `iteration-K/data/` | trajectories, candidates, relevance, correctness, groups; `data_report.md` |
| `iteration-K/retriever/`, `iteration-K/index/` | the trained retriever, and the corpus encoded with it |
| `evaluation/` | agents x retrievers on the test split |
| `costs.jsonl` | one line per finished phase: seconds (also of workers), rollouts, tokens; its line means done |
| `report.html`, `report.md` | the result |
| `done.json` | seconds of all phases; written last |
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin.agent import launch
from agentic_r_plugin.config import load_config, save_config
from agentic_r_plugin.data import report as data_report
from agentic_r_plugin.errors import ManifestMismatchError
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.loop.checks import check_files, check_settings
from agentic_r_plugin.loop.costs import Costs
from agentic_r_plugin.loop.forecast import forecast
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.loop.settings import IterateConfig
from agentic_r_plugin.report import report
from agentic_r_plugin.retriever import training
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.storage.claim import Claim, Output, companion
from agentic_r_plugin.store import read_json, read_lines
from agentic_r_plugin.world import generate

__all__ = ["IterateConfig", "Loop", "opened", "run"]


def run(config: IterateConfig, *, resume: bool = False) -> None:
    """Run the command `iterate`: start the loop, or resume it where it stopped.

    Raises:
        ConfigError: a section holds an unknown key or a wrong value; raised before anything runs.
        OutputExistsError: the run folder exists and `resume` is off.
        ManifestMismatchError: the run folder belongs to another configuration.
        AgenticRError: a phase failed; finished phases are kept.
    """
    phases = Phases(config)
    # First settings, then the plan, then files: a dry run prints the plan before it names missing paths.
    check_settings(phases)
    if config.dry_run:
        print(forecast(phases))
    check_files(phases)
    if config.dry_run:
        return
    with opened(phases, resume=resume) as loop:
        loop.make_world()
        agent, retriever = config.agent, config.retriever
        loop.build_index(0, retriever)
        for k in range(1, config.iterations + 1):
            # Retriever k-1 stays frozen while agent k is trained and its data are constructed (method, section 4).
            with loop.search_service(k) as url:
                agent = loop.train_agent(k, agent if config.agent_from == "previous" else config.agent, url)
                training_groups = loop.construct(k, agent, url)
            start = retriever if config.retriever_from == "previous" else config.retriever
            retriever = loop.train_retriever(k, start, training_groups)
            loop.build_index(k, retriever)
        loop.evaluate()
        loop.report()


@contextmanager
def opened(phases: Phases, *, resume: bool) -> Iterator[Loop]:
    """Lock the run folder and check that it belongs to this run.

    Raises:
        OutputExistsError: the run folder exists and `resume` is off, or another process is working in it.
        ManifestMismatchError: the run folder belongs to another configuration, agent, retriever or questions.
    """
    output = Output(out=phases.folder, made_from=phases.made_from(), done="done.json", folder=True)
    begun = (output.before() or {}).get("evaluate.out") if resume else None
    if begun and Path(begun).parent != phases.folder:
        was = Path(begun).parent
        raise ManifestMismatchError(
            f"{phases.folder}: the run was begun with out={was}, and its indexes name files there; give out={was} (for "
            f"a run that was moved, after moving it back or `ln -s {phases.folder.resolve()} {was}`)"
        )
    with output.claim(resume=resume) as held:
        held.begin()
        saved = phases.folder / "config.yaml"
        # A resume may change settings that decide no result; the file holds those in use now.
        if not saved.exists() or load_config(IterateConfig, saved) != phases.config:
            save_config(phases.config, saved)
        yield Loop(phases, held)


class Loop:
    """Runs the phases. Each is a command on files of the run folder and runs once."""

    def __init__(self, phases: Phases, held: Claim) -> None:
        self.phases, self._held = phases, held
        self.costs = Costs(held, phases.config.expected())

    def make_world(self) -> None:
        """Generate the benchmark, if none is given."""
        if not self.phases.config.benchmark:
            self.costs.phase(0, "world", lambda: generate.run(self.phases.world(), resume=True))

    def build_index(self, k: int, retriever: str) -> None:
        """Encode the corpus with retriever k."""
        config = self.phases.index(k, retriever)
        self.costs.phase(k, "index", lambda: index.run(config, resume=True))

    @contextmanager
    def search_service(self, k: int) -> Iterator[str]:
        """Run the service with retriever k-1, unless all phases that need it are done."""
        ppo = ["train-agent"] if self.phases.config.train_agents else []
        if all((k, name) in self.costs.done for name in (*ppo, *self.phases.stages())):
            yield ""
            return
        with server.running_service(self.phases.serve(str(self.phases.index_folder(k - 1)))) as url:
            yield url

    def train_agent(self, k: int, agent: str, url: str) -> str:
        """PPO with the frozen retriever k-1; returns the trained agent's folder (without PPO: the given agent)."""
        if self.phases.config.train_agents:
            config = self.phases.train_agent(k, agent, url)
            cost = partial(_agent_cost, Path(config.out))
            self.costs.phase(k, "train-agent", lambda: launch.run(config, resume=True), cost)
        return self.phases.agent(k)

    def construct(self, k: int, agent: str, url: str) -> str:
        """Data construction with agent k and retriever k-1; returns the training groups."""
        for name, module in self.phases.stages().items():
            out = self.phases.data(k, name)
            self.costs.phase(
                k,
                name,
                partial(module.run, self.phases.stage(k, name, agent, url), resume=True),
                partial(read_json, companion(out, ".report.json")),
            )
        groups, threshold = self.phases.data(k, "groups"), self.phases.planned["groups"].threshold
        data_report.write_report(data_report.DataReportConfig(data=str(groups.parent), threshold=threshold))
        self.warn_of_collapse(k)
        return str(groups)

    def warn_of_collapse(self, k: int) -> None:
        """Say so if the share of queries with a positive is less than half of that of the iteration before."""
        if k == 1:
            return
        before, now = (read_json(companion(self.phases.data(j, "groups"), ".report.json")) for j in (k - 1, k))
        shares = [report["kept"] / max(report["read"], 1) for report in (before, now)]
        if shares[1] < shares[0] / 2:
            print(
                f"[iteration {k}] warning: {now['kept']} of {now['read']} queries have a positive ({shares[1]:.0%}), "
                f"{shares[0]:.0%} in iteration {k - 1}; see {self.phases.data(k, 'groups').parent}/data_report.md, and "
                f"compare retriever {k - 1} with the one before it",
                file=sys.stderr,
                flush=True,
            )

    def train_retriever(self, k: int, start: str, training_groups: str) -> str:
        """Contrastive training on iteration k's groups; returns the checkpoint's folder."""
        config = self.phases.train_retriever(k, start, training_groups)
        self.costs.phase(k, "train-retriever", lambda: training.run_apart(config))
        return config.out

    def evaluate(self) -> None:
        """Agents x retrievers on the test split, through FlashRAG."""
        last = self.phases.config.iterations
        agents = [self.phases.agent(k) for k in range(last + 1)]
        indexes = [str(self.phases.index_folder(k)) for k in range(last + 1)]
        config = self.phases.evaluate(agents, indexes)
        self.costs.phase(last, "evaluate", lambda: evaluate.run(config, resume=True))

    def report(self) -> None:
        """Write the report. It is rewritten every time, because that is cheap and shows the current state."""
        folder = self.phases.folder
        print((folder / "evaluation" / "matrix.md").read_text(encoding="utf-8"))
        values = {"run": str(folder)} | self.phases.config.report
        report.run(load_config(report.ReportConfig, values=values), resume=True)
        self._held.finish({"seconds": round(sum(line["seconds"] for line in self.costs.done.values()), 1)})


def _agent_cost(out: Path) -> dict[str, Any]:
    """Cost of PPO, summed from its step log, whose values are means over the trajectories of a step.

    Trajectories whose search failed are left out of the means and counted here with the mean of the others.
    """
    steps = [line for _, line in read_lines(out / "metrics.jsonl") if line.get("agentic_r/trajectories")]

    def total(name: str) -> int:
        return round(sum(line[f"agentic_r/{name}"] * line["agentic_r/trajectories"] for line in steps))

    return {
        "steps": len(steps),
        "rollouts": round(sum(line["agentic_r/trajectories"] for line in steps)),
        "searches": total("search_turns"),
        "generated_tokens": total("generated_tokens"),
    }
