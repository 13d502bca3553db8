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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.agent import launch
from agentic_r_plugin.backends import LLMSpec
from agentic_r_plugin.config import FREE, LATER, deciding, load_config, merged, save_config, section_of, to_dict
from agentic_r_plugin.credentials import read_secret
from agentic_r_plugin.data import candidates, correctness, groups, plan, relevance, sub_answers, trajectories
from agentic_r_plugin.data import report as data_report
from agentic_r_plugin.data.selection import selection_named
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.memory import give_back_memory
from agentic_r_plugin.net import is_loopback
from agentic_r_plugin.progress import duration, scaled
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.query import DEFAULT_FORMULATION, needs_reasoning
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.report import report
from agentic_r_plugin.retriever import training
from agentic_r_plugin.search.corpus import corpus_file, count_lines
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.storage.claim import Claim, Output
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import drop_torn_end, dump_line, read_json, read_lines
from agentic_r_plugin.world import generate

_URL = "http://127.0.0.1:1"
"""Placeholder for the address of the retrieval service in configurations that are only checked."""
_KEEP_S = 10.0
"""Seconds between two notes in the manifest of how long the unfinished phase has taken, over all attempts."""
_CHOICES = {
    "agent_from": ("previous", "first"),
    "retriever_from": ("previous", "first"),
    "critic_from": ("new", "previous"),
}

_SECTION = {"decides": "phases"}
"""Metadata of a section. On a resume, the settings of the phases composed from it are compared (`_deciding`)."""


def _section(cls: type, text: str = "the loop fills in the rest") -> dict[str, Any]:
    return {**section_of(cls), **_SECTION, "help": text}


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """Agent and retriever train each other, K times.

    A section named after a command holds fields of that command. The loop fills in paths, models, protocol and limits.
    A section may override these field by field, except for the location of the output.
    """

    out: str = field(metadata={"help": "run folder", **FREE})
    agent: str = field(metadata={"help": "folder of the agent to start from"})
    retriever: str = field(metadata={"help": "retriever to start from: folder, or builtin:NAME"})
    benchmark: str = field(default="", metadata={"help": "benchmark in FlashRAG layout; empty: generate one (world)"})
    corpus: str = field(default="", metadata={"help": "corpus, where it is not the benchmark's corpus.jsonl"})
    format: str = field(default="", metadata=FORMAT)
    iterations: int = field(default=2, metadata={"help": "K"})
    dry_run: bool = field(
        default=False, metadata={"help": "compose every phase, check paths, print a forecast, stop", **FREE}
    )
    seed: int = field(default=0, metadata={"help": "of training, sampling and selection; the world has its own"})
    train_agents: bool = field(
        default=True,
        metadata={
            "help": "off: no PPO; the given agent is that of every iteration",
            **LATER,
        },
    )
    agent_from: str = field(default="previous", metadata={"help": "PPO of iteration k starts from: previous, first"})
    critic_from: str = field(
        default="new", metadata={"help": "critic of iteration k > 1 starts from: new (as train_agent says), previous"}
    )
    retriever_from: str = field(default="previous", metadata={"help": "retriever k starts from: previous, first"})
    protocol: str = field(default="search_r1", metadata={"help": "registered agent_protocol"})
    protocol_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the protocol that differ from its own", **LATER}
    )
    limits: Limits = field(default_factory=Limits, metadata={"help": "how far a trajectory may go"})
    topk: int = field(default=3, metadata={"help": "passages shown for a search"})
    train_split: str = field(default="train", metadata={"help": "questions of PPO and of data construction"})
    dev_split: str = field(default="dev", metadata={"help": "questions PPO is validated on; empty: none"})
    test_split: str = field(default="test", metadata={"help": "questions of the evaluation"})
    judge: bool = field(default=False, metadata={"help": "ask a judge for sub-answers (needs a sub_answers section)"})
    llm: LLMSpec = field(default_factory=LLMSpec, metadata={"help": "how the agent is run outside PPO"})
    world: generate.WorldConfig = field(
        default_factory=generate.WorldConfig, metadata={"help": "the generated benchmark", **_SECTION}
    )
    index: dict[str, Any] = field(default_factory=dict, metadata=_section(index.IndexConfig))
    serve: server.ServeConfig = field(
        default_factory=lambda: server.ServeConfig(port=0), metadata={"help": "the retrieval service", **_SECTION}
    )
    train_agent: dict[str, Any] = field(default_factory=dict, metadata=_section(launch.TrainAgentConfig))
    train_agent_later: dict[str, Any] = field(
        default_factory=dict,
        metadata=_section(launch.TrainAgentConfig, "what differs in train_agent from the second iteration on"),
    )
    trajectories: dict[str, Any] = field(default_factory=dict, metadata=_section(trajectories.TrajectoriesConfig))
    candidates: dict[str, Any] = field(default_factory=dict, metadata=_section(candidates.CandidatesConfig))
    sub_answers: dict[str, Any] = field(default_factory=dict, metadata=_section(sub_answers.SubAnswersConfig))
    relevance: dict[str, Any] = field(default_factory=dict, metadata=_section(relevance.RelevanceConfig))
    correctness: dict[str, Any] = field(default_factory=dict, metadata=_section(correctness.CorrectnessConfig))
    groups: dict[str, Any] = field(default_factory=dict, metadata=_section(groups.GroupsConfig))
    train_retriever: dict[str, Any] = field(default_factory=dict, metadata=_section(training.TrainRetrieverConfig))
    evaluate: dict[str, Any] = field(default_factory=dict, metadata=_section(EvaluateConfig))
    report: dict[str, Any] = field(
        default_factory=dict, metadata={**section_of(report.ReportConfig), **FREE, "help": "the loop fills in the rest"}
    )
    expected_seconds: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "iteration -> phase -> seconds on some machine, for the estimate of the time left",
            **FREE,
        },
    )
    plan: plan.PlanConfig = field(
        default_factory=plan.PlanConfig, metadata={"help": "assumptions of the forecast", **FREE}
    )

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, found {self.iterations}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")

    def expected(self) -> dict[tuple[int, str], float]:
        """`expected_seconds` by (iteration, phase), without iterations that the loop does not have."""
        return {
            (int(number), phase): float(seconds)
            for number, phases in self.expected_seconds.items()
            if int(number) <= self.iterations
            for phase, seconds in phases.items()
            if self.train_agents or phase != "train-agent"
        }


def run(config: IterateConfig, *, resume: bool = False) -> None:
    """Run the command `iterate`: start the loop, or resume it where it stopped.

    Raises:
        ConfigError: a section holds an unknown key or a wrong value; raised before anything runs.
        OutputExistsError: the run folder exists and `resume` is off.
        ManifestMismatchError: the run folder belongs to another configuration.
        AgenticRError: a phase failed; finished phases are kept.
    """
    loop = Loop(config)
    if config.dry_run:
        loop.compose()
        print(loop.forecast())
    loop.check()
    if config.dry_run:
        return
    with loop.open(resume=resume):
        agent, retriever = config.agent, config.retriever
        agents, indexes = {"agent-0": agent}, {"retriever-0": loop.build_index(0, retriever)}
        for k in range(1, config.iterations + 1):
            previous_index = indexes[f"retriever-{k - 1}"]
            with loop.search_service(k, previous_index) as url:
                agent = loop.train_agent(k, agent if config.agent_from == "previous" else config.agent, url)
                training_groups = loop.construct(k, agent, url)
            start = retriever if config.retriever_from == "previous" else config.retriever
            retriever = loop.train_retriever(k, start, training_groups)
            agents[f"agent-{k}"], indexes[f"retriever-{k}"] = agent, loop.build_index(k, retriever)
        loop.evaluate(agents, indexes)
        loop.report()


class Loop:
    """The phases of the loop. Each is a command on files of the run folder and runs once."""

    def __init__(self, config: IterateConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.benchmark = Path(config.benchmark) if config.benchmark else self.folder / "benchmark" / "fictional_world"
        self.corpus = Path(config.corpus) if config.corpus else corpus_file(self.benchmark)
        self._done: dict[tuple[int, str], Any] = {}
        self._held: Claim

    # --- checks before the start

    def compose(self) -> None:
        """Build the configuration of every phase with placeholder paths, so that a wrong key is found at the start."""
        given = {item.name: getattr(self.config, item.name) for item in fields(IterateConfig) if item.name != "report"}
        for name, section in given.items():
            if section.get("out") if isinstance(section, dict) else getattr(section, "out", ""):
                raise ConfigError(
                    f"{name}.out: not a setting of the loop, whose run folder holds every output; set out"
                )
        for name in ("train_agent", "train_agent_later"):
            _check_preset(name, getattr(self.config, name).get("preset", "paper"))
        phases = self.phases()
        self._check_reach(self._check_stages())
        components.load("retriever_trainer", phases["train_retriever"].trainer)

    def phases(self) -> dict[str, Any]:
        """Section -> configuration of the phase in the first iteration (`train_agent_later`: in the second).

        Paths of files that the loop itself creates are placeholders.
        """
        world = {} if self.config.benchmark else {"world": self._world_config()}
        return {
            **world,
            "index": self._index_config(0, "x"),
            "serve": self.serve_config("x"),
            "train_agent": self._train_agent_config(1, "x", _URL),
            "train_agent_later": self._train_agent_config(2, "x", _URL),
            **{name.replace("-", "_"): self.stage_config(1, name, "x", _URL) for name in self._data_stages()},
            "train_retriever": self.train_retriever_config(1, "x", Path("x")),
            "evaluate": self._planned_evaluation(),
        }

    def _check_stages(self) -> dict[str, Any]:
        """Check the settings of each data stage and their combination; returns the settings."""
        made = {name: self.stage_config(1, name, "x", _URL) for name in self._data_stages()}
        for name in made.keys() & {"relevance", "correctness", "groups"}:
            made[name].check()
        judged = ["relevance"] if "relevance" in made and made["relevance"].passages_per_prompt() else []
        for name in [*judged, *(["sub-answers"] if self.config.judge else [])]:
            if not made[name].llm.model:
                raise ConfigError(f"{name.replace('-', '_')}.llm.model: expected the judge, found nothing")
        rule, rolled_out = made["groups"].rule(), made.get("correctness")
        if rolled_out and rule.use_correctness and not rolled_out.exhaustive:
            groups.check_pruned(rule, rolled_out.rule())
        return made

    def _check_reach(self, stages: Mapping[str, Any]) -> None:
        """Check that workers on other machines can reach the retrieval service."""
        host = self.serve_config("x").host
        if not is_loopback(host):
            return
        far = [
            f"{name}.runner.address={stage.runner.address}"
            for name, stage in stages.items()
            if hasattr(stage, "search") and stage.search.url == _URL
            if stage.runner.elsewhere
        ]
        ppo = [self._train_agent_config(k, "x", _URL) for k in (1, 2)]
        if any(settings.nodes + settings.rollout_nodes > 1 for settings in ppo):
            far.append("train_agent on several machines")
        if far:
            raise ConfigError(
                f"serve.host={host}: other machines cannot reach it, and there is {', '.join(far)}; set "
                "serve.host=0.0.0.0 (or this machine's address) and serve.token_env=NAME, a variable that is exported "
                "here and before `ray start` on every machine"
            )

    def check(self) -> None:
        """Find every error that can be found before the start.

        Raises:
            ConfigError: a key is wrong, or files do not exist; the message names all of them.
        """
        self.compose()
        missing = []
        for name in (self.config.train_split, self.config.dev_split, self.config.test_split):
            if self.config.benchmark and name and not Path(self._questions(name)).is_file():
                missing.append(f"benchmark: {self._questions(name)} does not exist")
        try:
            read_secret(self._token_env, "serve.token_env")
        except ConfigError as error:
            missing.append(str(error))
        if (self.config.benchmark or self.config.corpus) and not self.corpus.exists():
            missing.append(f"corpus: {self.corpus} does not exist")
        if not Path(self.config.agent).is_dir():
            missing.append(f"agent: {self.config.agent} is not a folder")
        for name in ("sub_answers", "relevance") if self.config.judge else ("relevance",):
            model = getattr(self.config, name).get("llm", {}).get("model", "")
            if model.startswith(("/", "./", "models/")) and not Path(model).exists():
                missing.append(f"{name}.llm.model: {model} does not exist")
        try:
            self._check_evaluation()
        except ConfigError as error:
            missing.append(f"evaluate: {error}")
        if missing:
            raise ConfigError("; ".join(missing))

    def _planned_evaluation(self) -> EvaluateConfig:
        """The evaluation, with placeholders for the agents and indexes of the loop."""
        rounds = range(self.config.iterations + 1)
        return self._evaluate_config({f"agent-{k}": "x" for k in rounds}, {f"retriever-{k}": Path("x") for k in rounds})

    def _check_evaluation(self) -> None:
        """Check benchmarks, and agents and retrievers from outside the loop. A world not yet generated is skipped."""
        config = self._planned_evaluation()
        made = {name for name, where in (config.agents | config.searches).items() if where == "x"}
        if self.config.benchmark or config.data_dir != str(self.benchmark.parent):
            evaluate.check_inputs(config, later=made)

    def forecast(self) -> str:
        """Forecast of the loop's cost, from the assumptions in `plan`."""
        settings = self.config.plan
        rounds = range(1, self.config.iterations + 1)
        ppo = [self._train_agent_config(k, "x", _URL) for k in rounds]
        steps = [item.steps if self.config.train_agents else 0 for item in ppo]
        stages = {name: self.stage_config(1, name, "x", _URL) for name in self._data_stages()}
        train = Path(self._questions(self.config.train_split))
        questions = settings.train_questions
        if not questions and train.is_file():
            questions = sum(1 for _ in read_questions(train, format=self.config.format))
        first = plan.Scale(
            questions=stages["trajectories"].num_questions or questions,
            passages=settings.corpus_passages or count_lines(self.corpus),
            ppo_steps=steps[0],
            ppo_batch=ppo[0].batch_size * ppo[0].samples,
            candidates=stages["candidates"].topk,
            window=stages["relevance"].passages_per_prompt() if "relevance" in stages else 0,
            sub_answers=self.config.judge,
            exhaustive="correctness" in stages and stages["correctness"].exhaustive,
            left_out=frozenset({"relevance", "correctness"} - stages.keys()),
            epochs=self.train_retriever_config(1, "x", Path("x")).epochs,
        )
        scales = [
            replace(first, ppo_steps=each, ppo_batch=item.batch_size * item.samples)
            for each, item in zip(steps, ppo, strict=True)
        ]
        return plan.table(scales, settings)

    @contextmanager
    def open(self, *, resume: bool) -> Iterator[None]:
        """Lock the run folder, check that it belongs to this run, and read which phases are done.

        Raises:
            OutputExistsError: the run folder exists and `resume` is off, or another process is working in it.
            ManifestMismatchError: the run folder belongs to another configuration, agent, retriever or questions.
        """
        output = Output(out=self.folder, made_from=self._made_from(), done="done.json", folder=True)
        with output.claim(resume=resume) as self._held:
            self._held.begin()
            saved, costs = self.folder / "config.yaml", self.folder / "costs.jsonl"
            if not saved.exists() or load_config(IterateConfig, saved) != self.config:
                save_config(self.config, saved)
            drop_torn_end(costs)
            if costs.exists():
                self._done = {(line["iteration"], line["phase"]): line for _, line in read_lines(costs)}
            if not self.config.benchmark:
                self._phase(0, "world", lambda: generate.run(self._world_config(), resume=True))
            yield

    def _made_from(self) -> dict[str, Any]:
        """Settings that can change the results, and contents of agent, retriever and questions.

        Finished phases are not run again, so these are compared here. The manifests of the indexes record the corpus.
        """
        config = self.config
        given = {"agent": config.agent, "retriever": config.retriever}
        if config.benchmark:
            for split in filter(None, (config.train_split, config.dev_split, config.test_split)):
                given[f"questions of {split}"] = self._questions(split)
        return _deciding(self) | {f"contents of {name}": path_fingerprint(where) for name, where in given.items()}

    def _phase(
        self, iteration: int, name: str, work: Callable[[], object], cost: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Run a phase unless it is done. Its line in costs.jsonl is written last."""
        if (iteration, name) in self._done:
            return
        print(f"[iteration {iteration}] {name}{self._estimate(iteration, name)}", file=sys.stderr, flush=True)
        with self._timed(iteration, name) as seconds:
            work()
            give_back_memory()
        spent = {"worker_seconds" if key == "seconds" else key: value for key, value in cost().items()}
        line = {"iteration": iteration, "phase": name, **spent, "seconds": round(seconds(), 1)}
        with (self.folder / "costs.jsonl").open("ab") as stream:
            stream.write(dump_line(line))
        self._done[iteration, name] = line

    def _estimate(self, iteration: int, name: str) -> str:
        """Text with the time that this phase and the rest of the loop will take; empty without `expected_seconds`."""
        took = {phase: float(line["seconds"]) for phase, line in self._done.items()}
        left = scaled(self.config.expected(), took)  # finished phases show how fast this machine is
        if (iteration, name) not in left:
            return ""
        return f": about {duration(left[iteration, name])}; {duration(sum(left.values()))} left in all"

    @contextmanager
    def _timed(self, iteration: int, name: str) -> Iterator[Callable[[], float]]:
        """Clock of a phase that includes its earlier attempts. A kill loses at most the last `_KEEP_S` seconds."""
        phase = {"iteration": iteration, "phase": name}
        before = self._held.noted("attempt", {})
        earlier = before["seconds"] if phase.items() <= before.items() else 0.0
        started, ended = time.monotonic(), threading.Event()

        def seconds() -> float:
            return earlier + time.monotonic() - started

        def keep() -> None:
            while not ended.wait(_KEEP_S):
                self._held.note(attempt=phase | {"seconds": seconds()})

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield seconds
        finally:
            ended.set()
            keeper.join()
            self._held.note(attempt=phase | {"seconds": seconds()})

    # --- the phases

    def build_index(self, k: int, retriever: str) -> Path:
        """Encode the corpus with retriever k."""
        out = self.folder / f"iteration-{k}" / "index"
        self._phase(k, "index", lambda: index.run(self._index_config(k, retriever), resume=True))
        return out

    @contextmanager
    def search_service(self, k: int, index_dir: Path) -> Iterator[str]:
        """Run the retrieval service of iteration k, unless all phases that need it are done."""
        training = ["train-agent"] if self.config.train_agents else []
        if all((k, name) in self._done for name in (*training, *self._data_stages())):
            yield ""
            return
        with server.running_service(self.serve_config(str(index_dir))) as url:
            yield url

    def train_agent(self, k: int, agent: str, url: str) -> str:
        """PPO with the frozen retriever k-1; returns the trained agent's folder (without PPO: the given agent)."""
        if not self.config.train_agents:
            return self.config.agent
        out = self.folder / f"iteration-{k}" / "agent"
        self._phase(
            k,
            "train-agent",
            lambda: launch.run(self._train_agent_config(k, agent, url), resume=True),
            lambda: _agent_cost(out),
        )
        return str(out / "agent")

    def construct(self, k: int, agent: str, url: str) -> Path:
        """Data construction with agent k and retriever k-1; returns the training groups."""
        for name, module in self._data_stages().items():
            out = self._data(k, name)
            self._phase(
                k,
                name,
                partial(module.run, self.stage_config(k, name, agent, url), resume=True),
                partial(read_json, out.with_name(out.name + ".report.json")),
            )
        folder = self._data(k, "groups").parent
        data_report.write_report(data_report.DataReportConfig(data=str(folder)), folder / "data_report.json")
        return self._data(k, "groups")

    def train_retriever(self, k: int, start: str, training_groups: Path) -> str:
        """Contrastive training on iteration k's groups; returns the checkpoint's folder."""
        config = self.train_retriever_config(k, start, training_groups)
        self._phase(k, "train-retriever", lambda: training.run_apart(config))
        return config.out

    def evaluate(self, agents: Mapping[str, str], indexes: Mapping[str, Path]) -> None:
        """Agents x retrievers on the test split, through FlashRAG."""
        config = self._evaluate_config(agents, indexes)
        self._phase(self.config.iterations, "evaluate", lambda: evaluate.run(config, resume=True))

    def report(self) -> None:
        """Write the report. It is rewritten every time, because that is cheap and shows the current state."""
        print((self.folder / "evaluation" / "matrix.md").read_text(encoding="utf-8"))
        report.run(load_config(report.ReportConfig, values={"run": str(self.folder)} | self.config.report), resume=True)
        self._held.finish({"seconds": round(sum(line["seconds"] for line in self._done.values()), 1)})

    # --- configurations of the phases

    def _data_stages(self) -> dict[str, Any]:
        """Command -> module; of relevance and correctness, those that the selection or the trainer reads."""
        trainer = self.config.train_retriever
        read = {"relevance"} if trainer.get("trainer", "contrastive") != "contrastive" else set()
        read |= trainer.keys() | selection_named(self.config.groups.get("preset", "paper")).needs
        judge = {"sub-answers": sub_answers} if self.config.judge else {}
        scores = {"relevance": relevance, "correctness": correctness}
        return {
            "trajectories": trajectories,
            "candidates": candidates,
            **judge,
            **{name: module for name, module in scores.items() if name in read},
            "groups": groups,
        }

    def _data(self, k: int, name: str) -> Path:
        return self.folder / f"iteration-{k}" / "data" / f"{name.replace('-', '_')}.jsonl"

    def _questions(self, split: str) -> str:
        with suppress(ConfigError):
            return str(split_file(self.benchmark, split))
        return str(self.benchmark / f"{split}.jsonl")  # the world is not generated yet

    def _world_config(self) -> generate.WorldConfig:
        return replace(self.config.world, out=str(self.benchmark.parent), name=self.benchmark.name)

    def _index_config(self, k: int, retriever: str) -> index.IndexConfig:
        out = str(self.folder / f"iteration-{k}" / "index")
        values = {"corpus": str(self.corpus), "retriever": retriever, "out": out}
        return load_config(index.IndexConfig, values=self.config.index | values)

    def serve_config(self, index_dir: str) -> server.ServeConfig:
        """The retrieval service on an index."""
        return replace(self.config.serve, index=index_dir)

    def _train_agent_config(self, k: int, agent: str, url: str) -> launch.TrainAgentConfig:
        section = merged(self.config.train_agent, self.config.train_agent_later if k > 1 else {})
        dev = {"validation": self._questions(self.config.dev_split)} if self.config.dev_split else {}
        paths = {
            "model": agent,
            "questions": self._questions(self.config.train_split),
            "retrieval_url": url,
            "out": str(self.folder / f"iteration-{k}" / "agent"),
        }
        known = {"seed": self._seed(k), "retrieval_token_env": self._token_env, "format": self.config.format}
        if k > 1 and self.config.critic_from == "previous":
            paths["critic"] = str(self.folder / f"iteration-{k - 1}" / "agent" / "critic")
        values = merged(known | self.protocol_settings(), section)
        return load_config(launch.TrainAgentConfig, values=values | dev | paths)

    @property
    def _token_env(self) -> str:
        """Environment variable with the token of the loop's retrieval service; empty if it needs none."""
        return self.config.serve.token_env

    def _seed(self, k: int) -> int:
        """Seed of iteration k. It differs between iterations, so that each draws other samples."""
        return self.config.seed + k - 1

    def protocol_settings(self) -> dict[str, Any]:
        """Protocol, its options, limits and topk, for every phase in which the agent acts."""
        config = self.config
        return {
            "protocol": config.protocol,
            "protocol_options": config.protocol_options,
            "limits": to_dict(config.limits),
            "topk": config.topk,
        }

    def stage_config(self, k: int, name: str, agent: str, url: str) -> Any:
        """Configuration of a data stage: the loop's files and models, overridden by the stage's section."""
        section = getattr(self.config, name.replace("-", "_"))
        cls = _CONFIG_OF[name]
        llm = to_dict(self.config.llm) | {"model": agent}
        search: dict[str, Any] = {"backend": "service", "url": url}
        # The token belongs to the loop's own service and must not be sent to any other.
        if self._token_env and not section.get("search", {}).keys() & {"backend", "url"}:
            search["options"] = {"token_env": self._token_env}
        files = {item: str(self._data(k, item)) for item in ("candidates", "relevance", "correctness", "groups")}
        in_ = self._questions(self.config.train_split) if name == "trajectories" else str(self._data(k, "trajectories"))
        known: dict[str, Any] = {
            "in_": in_,
            "out": str(self._data(k, name)),
            "candidates": files["candidates"],
            "relevance": "" if section.get("exhaustive") else files["relevance"],
            "correctness": files["correctness"],
            "corpus": str(self.corpus),
            "questions": self._questions(self.config.train_split),
            "sub_answers": str(self._data(k, "sub-answers")) if self.config.judge else "",
            "search": search,
            "seed": self._seed(k),
            "protocol": self.config.protocol,
            "protocol_options": self.config.protocol_options,
            "format": self.config.format,
            "reasoning": needs_reasoning(self.config.train_retriever.get("formulation") or DEFAULT_FORMULATION),
        }
        if name in ("trajectories", "correctness"):
            known |= self.protocol_settings() | {"llm": llm}
        if name == "correctness" and "preset" in self.config.groups:
            known["preset"] = self.config.groups["preset"]  # the pruning must match the rule of the groups
        if name == "groups" and "trajectories" in selection_named(section.get("preset", "paper")).needs:
            known["trajectories"] = str(self._data(k, "trajectories"))
        own = {field.name for field in fields(cls)}
        return load_config(cls, values=merged({key: value for key, value in known.items() if key in own}, section))

    def train_retriever_config(
        self, k: int, start: str, training_groups: Path, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> training.TrainRetrieverConfig:
        """Configuration that trains retriever k from `start`: the section, overridden by `changes` and our paths."""
        values = {"seed": self._seed(k)} | self.config.train_retriever | dict(changes)
        if values.get("trainer", "contrastive") != "contrastive":
            values = {"relevance": str(self._data(k, "relevance"))} | values
        paths = {
            "groups": str(training_groups),
            "corpus": str(self.corpus),
            "retriever": start,
            "out": str(self.folder / f"iteration-{k}" / "retriever"),
        }
        return load_config(training.TrainRetrieverConfig, values=values | paths)

    def _evaluate_config(self, agents: Mapping[str, str], indexes: Mapping[str, Path]) -> EvaluateConfig:
        values = {
            "out": str(self.folder / "evaluation"),
            "data_dir": str(self.benchmark.parent),
            "benchmarks": [self.benchmark.name],
            "split": self.config.test_split,
            "format": self.config.format,
            "agents": dict(agents),
            "searches": {name: str(folder) for name, folder in indexes.items()},
            "settings": self.protocol_settings() | {"agent": to_dict(self.config.llm)},
        }
        return load_config(EvaluateConfig, values=merged(values, self.config.evaluate))


def _deciding(loop: Loop) -> dict[str, Any]:
    """Settings that can change the loop's results, by dotted name.

    For a section these are the settings of the phases composed from it. Each command's fields declare which ones count.
    """
    phases = {name: deciding(phase, names=True) for name, phase in loop.phases().items()}
    found = deciding(loop.config) | phases
    return dict(_flat(found))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_preset(section: str, preset: str) -> None:
    """Refuse a preset with values: the loop's limits, shared with data and evaluation, would override its limits."""
    held = dict(launch.TrainAgentConfig.PRESETS.get(preset, {}))
    if held:
        limits = [f"limits.{key}={value}" for key, value in held.pop("limits", {}).items()]
        rest = [f"{section}.{key}={value}" for key, value in held.items()]
        raise ConfigError(
            f"{section}.preset={preset}: expected paper, because the limits of the loop hold for PPO, data and "
            f"evaluation alike and not for PPO alone; set its values instead: {' '.join([*limits, *rest])}"
        )


_CONFIG_OF: dict[str, Any] = {
    item.name.replace("_", "-"): item.metadata["section"]
    for item in fields(IterateConfig)
    if "section" in item.metadata
}
"""Command -> the class of its settings."""


def _agent_cost(out: Path) -> dict[str, Any]:
    """Cost of PPO, summed from its step log, whose values are means over the trajectories of a step."""
    steps = [line for _, line in read_lines(out / "metrics.jsonl") if line.get("agentic_r/trajectories")]

    def total(name: str) -> int:
        return round(sum(line[f"agentic_r/{name}"] * line["agentic_r/trajectories"] for line in steps))

    return {
        "steps": len(steps),
        "rollouts": round(sum(line["agentic_r/trajectories"] for line in steps)),
        "searches": total("search_turns"),
        "generated_tokens": total("generated_tokens"),
    }
