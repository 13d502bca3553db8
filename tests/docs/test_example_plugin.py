"""The example of docs/extend.md: installed as a user would, and used by the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "example_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment of a process that finds the example installed."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(folder / "site"), str(source)], check=True, timeout=120)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


def run(environment, *command):
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_components_are_listed(installed):
    rows = json.loads(run(installed, "-m", "agentic_r_plugin.cli", "components", "--json"))
    found = {
        f"{row['kind']}.{row['name']}": row["description"] for row in rows if row["package"] == "agentic-r-example"
    }
    assert found == {
        "query_formulation.query_question": "Query first, then the question.",
        "agent_protocol.lookup": "Searches with <lookup>, answers with <final>.",
        "reward.brief": "1 if there is an answer of at most `words` words.",
        "relevance_scorer.title_words": "Relevance by the words of the title: no model, and no question file.",
    }


def test_its_formulation_makes_the_retrievers_input(installed):
    code = (
        "from agentic_r_plugin.query import retrieval_query as q; print(q('Who?', 'x', formulation='query_question'))"
    )
    assert run(installed, "-c", code) == "x | Who?\n"


def test_its_scorer_scores_candidates_in_the_relevance_stage(installed, tmp_path):
    passages = [{"id": "1", "score": 2.0}, {"id": "2", "score": 1.0}]
    query = {
        "schema": "candidates/1", "id": "q", "turn": 1, "question": "Who?", "golden_answers": ["x"],
        "query": "river Nile source", "history": [], "prefix": "", "passages": passages,
    }  # fmt: skip
    (tmp_path / "candidates.jsonl").write_text(json.dumps(query) + "\n", encoding="utf-8")
    corpus = [{"id": "1", "contents": '"The Nile"\nA river.'}, {"id": "2", "contents": '"Nile Delta"\nLand.'}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus), encoding="utf-8")
    files = [f"--{name}={tmp_path / name}.jsonl" for name in ("candidates", "corpus")]
    out = tmp_path / "relevance.jsonl"
    scorer = ["--scorer=title_words", f"--out={out}", "options.full=90"]
    run(installed, "-m", "agentic_r_plugin.cli", "relevance", *files, *scorer)
    assert json.loads(out.read_text(encoding="utf-8"))["scores"] == {"1": 90, "2": 45}


def test_its_protocol_runs_a_trajectory(installed):
    code = """
from agentic_r_plugin import components
from agentic_r_plugin.protocol import Limits, Search
from agentic_r_plugin.records import Passage
from agentic_r_plugin.session import Session

class Letters:
    def encode_prompt(self, text): return self.encode(text)
    def encode(self, text): return [ord(letter) for letter in text]
    def decode(self, ids): return "".join(map(chr, ids))

codec = Letters()
session = Session(protocol=components.load("agent_protocol", "lookup"), codec=codec, limits=Limits(), question="Who?")
action = session.model_wrote(codec.encode("<lookup>Nile</lookup>"))
session.found([Passage(id="1", title="Nile", text="A river.")])
session.model_wrote(codec.encode("<final>a river</final>"))
print(action.query, "|", session.finished.answer, "|", "1. Nile: A river." in codec.decode(session.ids))
"""
    assert run(installed, "-c", code) == "Nile | a river | True\n"


def test_its_reward_is_a_part_of_the_sum(installed):
    code = (
        "from agentic_r_plugin.agent.rewards import Outcome, RewardSum\n"
        "from agentic_r_plugin.records import StopReason\n"
        "given = dict(question='Who?', golden_answers=('Ann',), shown=(), searches=0, turns=1, malformed_turns=0)\n"
        "reward = RewardSum({'exact_match': 1.0, 'brief': 0.1}, {'brief': {'words': 2}})\n"
        "for answer in ('Ann', 'it was Ann'):\n"
        "    print(reward.total(reward.parts(Outcome(**given, answer=answer, stop_reason=StopReason.ANSWERED))))"
    )
    assert run(installed, "-c", code) == "1.1\n0.0\n"


def test_its_advantage_is_computed_by_verl_and_leaves_masked_tokens_alone(installed):
    """Through verl's own function of the trainer's step, in a process that has only imported verl."""
    code = (
        "import torch, verl\n"
        "from verl import DataProto\n"
        "from verl.trainer.ppo.ray_trainer import compute_advantage\n"
        "rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])\n"
        "mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])\n"
        "data = DataProto.from_dict({'token_level_rewards': rewards, 'response_mask': mask})\n"
        "print(compute_advantage(data, 'batch_mean', config=None).batch['advantages'].tolist())"
    )
    assert run(installed, "-c", code).splitlines()[-1] == "[[0.5, 0.0, 0.5], [-0.5, -0.5, -0.5]]"
