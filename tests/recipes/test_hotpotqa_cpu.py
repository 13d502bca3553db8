"""The HotpotQA recipe: its files are ones the commands take, and its demonstrations work on the real questions."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from agentic_r_plugin.cli import COMMANDS
from agentic_r_plugin.config import load_config
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.store import read_records
from agentic_r_plugin.tags import compact
from recipes.hotpotqa_cpu.warm_start.__main__ import COMMAND
from recipes.hotpotqa_cpu.warm_start.demonstrations import DemonstrationSettings, demonstrate
from recipes.hotpotqa_cpu.warm_start.train import WarmStartSFTConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "hotpotqa_cpu"
DATA = Path(os.environ.get("AGENTIC_R_DATA", RECIPE.parents[1].parent / "shared" / "data")) / "hotpotqa"
GIVEN = {
    "warm_start.yaml": ("warm-start", ["model=m", "questions=q", "corpus=c", "out=o"]),
    "rollouts.yaml": ("trajectories", ["in_=q", "out=o"]),
    "retriever.yaml": ("train-retriever", ["groups=g", "corpus=c", "out=o"]),
    "evaluate.yaml": ("evaluate", ["out=o", "data_dir=d", "agents.a=m", "searches.b=i"]),
    "ppo.yaml": ("train-agent", ["model=m", "questions=q", "retrieval_url=http://127.0.0.1:1", "out=o"]),
}
"""File -> the command it is for, and what run.sh adds to it."""


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_every_configuration_is_one_its_command_takes(name: str) -> None:
    command, given = GIVEN[name]
    config_class, _ = (COMMANDS | {"warm-start": COMMAND})[command].load()
    load_config(config_class, RECIPE / name, given)


def test_no_configuration_file_is_left_unchecked() -> None:
    assert {path.name for path in RECIPE.glob("*.yaml")} == set(GIVEN)


def test_correctness_takes_the_settings_of_the_trajectories() -> None:
    trajectories, _ = COMMANDS["trajectories"].load()
    correctness, _ = COMMANDS["correctness"].load()
    first = load_config(trajectories, RECIPE / "rollouts.yaml", ["in_=q", "out=o"])
    second = load_config(correctness, RECIPE / "rollouts.yaml", ["candidates=c", "out=o", "corpus=c"])
    assert (first.protocol, first.limits, first.topk) == (second.protocol, second.limits, second.topk)


def test_the_agent_learns_under_the_limits_it_is_used_with() -> None:
    trajectories, _ = COMMANDS["trajectories"].load()
    rollouts = load_config(trajectories, RECIPE / "rollouts.yaml", ["in_=q", "out=o"])
    learnt = load_config(WarmStartSFTConfig, RECIPE / "warm_start.yaml", GIVEN["warm_start.yaml"][1])
    assert learnt.limits == rollouts.limits
    assert (learnt.protocol, learnt.demonstrations.topk) == (rollouts.protocol, rollouts.topk)


def test_the_script_is_valid_calls_known_commands_and_keeps_warm_start_and_data_questions_apart() -> None:
    script = RECIPE / "run.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    called = re.findall(r'"\$agentic_r" ([a-z-]+)', text)
    assert set(called) <= set(COMMANDS) and "evaluate" in called
    learnt = load_config(WarmStartSFTConfig, RECIPE / "warm_start.yaml", GIVEN["warm_start.yaml"][1])
    assert f"tail -n +{learnt.limit + 1} " in text


def test_the_matrix_over_both_sets_calls_run_first_and_then_known_commands_with_a_retriever_per_set(
    tmp_path: Path,
) -> None:
    data, out, log = tmp_path / "data", tmp_path / "out", tmp_path / "log"
    (data / "hotpotqa").mkdir(parents=True)
    (data / "hotpotqa" / "train.jsonl").write_text("")
    command = tmp_path / "command"
    command.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    command.chmod(0o755)
    environment = os.environ | {"AGENTIC_R": str(command), "PYTHON": "true", "AGENTIC_R_DATA": str(data)}
    (out / "index_base").mkdir(parents=True)
    (out / "index_trained").mkdir()
    subprocess.run([str(RECIPE / "matrix.sh"), str(out)], check=True, env=environment, capture_output=True)
    called = [line.split() for line in log.read_text().splitlines()]
    assert [words[0] for words in called[-4:]] == ["index", "index", "index", "evaluate"]
    assert {words[0] for words in called} <= set(COMMANDS)
    words = called[-1]
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    flags = {name: words[words.index(name) + 1] for name in ("--data-dir", "--out", "--first")}
    given = [f"data_dir={flags['--data-dir']}", f"out={flags['--out']}", f"first={flags['--first']}"]
    config = load_config(COMMANDS["evaluate"].load()[0], RECIPE / "evaluate.yaml", [*given, *overrides])
    assert config.benchmarks == ["hotpotqa", "2wikimultihopqa"] and list(config.searches) == ["bm25", "base", "trained"]
    assert all("{benchmark}" in place for place in config.searches.values())
    assert (out / "index" / "trained" / "hotpotqa").resolve() == (out / "index_trained").resolve()
    # A second retriever, before and after training on the same groups, with all questions.
    log.unlink()
    more = environment | {"SECOND": "e5=models/e5", "TEST": "all"}
    subprocess.run([str(RECIPE / "matrix.sh"), str(out)], check=True, env=more, capture_output=True)
    called = [line.split() for line in log.read_text().splitlines()][-6:]
    assert [words[0] for words in called] == ["train-retriever", "index", "index", "index", "index", "evaluate"]
    assert "retriever=models/e5" in called[0] and f"{out}/retriever_e5" in called[0]
    made = {(words[words.index("--retriever") + 1], words[words.index("--out") + 1]) for words in called[1:5]}
    assert made == {
        (model, f"{out}/index/{name}/{place}")
        for name, model in (("e5", "models/e5"), ("e5_trained", f"{out}/retriever_e5"))
        for place in ("hotpotqa", "2wikimultihopqa")
    }
    assert "--first" not in called[-1] and f"searches.e5_trained={out}/index/e5_trained/{{benchmark}}" in called[-1]


class _Words:
    """A codec with one id a word or space, close to a real tokenizer in length."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.ids: dict[str, int] = {}

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"\s*[\w]+|\s*[^\w\s]|\s+", text)
        for word in found:
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return [self.ids[word] for word in found]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[number] for number in ids)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no HotpotQA in FlashRAG layout at {DATA} (AGENTIC_R_DATA)")
def test_the_first_real_training_questions_give_demonstrations_that_answer_rightly() -> None:
    questions = list(islice(read_records(DATA / "train.jsonl", Question), 40))
    search = BM25Backend(DATA / "corpus.jsonl")
    limits = Limits(max_searches=3, max_tokens=1600, max_response_tokens=80, max_observation_tokens=400)
    sessions = demonstrate(questions, search, search.corpus, compact, _Words(), limits, DemonstrationSettings(), seed=0)
    golds = {question.question: question for question in questions}
    assert len(sessions) >= 38
    for session in sessions:
        gold = golds[session.question]
        shown = {passage.id for turn in session.turns for passage in turn.passages}
        assert session.finished is not None and session.finished.answer == gold.golden_answers[0].strip()
        assert set(gold.metadata["gold_doc_ids"]) <= shown
        assert 1 <= session.searches <= 3 and session.malformed == 0
