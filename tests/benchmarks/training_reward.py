"""Did PPO raise the reward it trains on? Both agents on the same training questions, sampled as in training.

    python tests/benchmarks/training_reward.py runs/quickstart --iteration 1

The reward of one PPO step is a mean over a few dozen trajectories of questions that no other step asks, so its curve is
mostly noise. Here the agent before and the agent after answer the same questions at temperature 1, with the retriever
that PPO searched with; the difference is compared question by question.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

from agentic_r_plugin.backends import SearchSpec, open_llm, open_search
from agentic_r_plugin.config import load_config
from agentic_r_plugin.data.trajectories import answer_questions
from agentic_r_plugin.evaluation.statistics import bootstrap_interval, paired_difference
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.llm.base import Sampling
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.protocol import load_protocol
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import read_records

_BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of agentic-r iterate")
    parser.add_argument("--iteration", type=int, default=1)
    parser.add_argument("--questions", type=int, default=0, help="only the first N training questions; 0: all")
    options = parser.parse_args()
    config, k = load_config(IterateConfig, options.run / "config.yaml"), options.iteration
    phases = Phases(replace(config, out=str(options.run)))
    questions = list(islice(read_records(phases.questions(config.train_split), Question), options.questions or None))
    rewards = {}
    for name, agent in (("before", phases.agent(k - 1)), ("after", phases.agent(k))):
        llm = replace(config.llm, model=agent, dtype="float32")
        search = SearchSpec(index=str(phases.index_folder(k - 1)))
        with open_llm(llm) as backend, open_search(search) as retriever:
            rewards[name] = [
                trajectory.em
                for start in range(0, len(questions), _BATCH)
                for trajectory in answer_questions(
                    questions[start : start + _BATCH],
                    backend,
                    retriever,
                    protocol=load_protocol(config.protocol, config.protocol_options),
                    limits=config.limits,
                    topk=config.topk,
                    sampling=Sampling(temperature=1.0, seed=config.seed),
                )
            ]
        interval = bootstrap_interval(rewards[name])
        print(
            f"{name}: reward {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}], {len(questions)} questions"
        )
    paired = paired_difference(rewards["before"], rewards["after"])
    print(json.dumps({"difference": paired.difference, "low": paired.low, "high": paired.high, "p": paired.p_value}))


if __name__ == "__main__":
    main()
