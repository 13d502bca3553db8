"""The rollout log in the form of verl's viewer, the page of trajectories, and the batch behind a broken loss."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from agentic_r_plugin.agent.culprit import write_culprit
from agentic_r_plugin.agent.metrics import RolloutLog, rollout_line
from agentic_r_plugin.agent.rollout_page import ShowRolloutsConfig, run
from agentic_r_plugin.errors import ConfigError, OutputExistsError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.records import Question
from agentic_r_plugin.rollout import to_trajectory
from agentic_r_plugin.store import read_json
from tests.agent.tiny_world import read_jsonl, scripted, town


def outcome(name: str, agent_dir: Path) -> dict[str, Any]:
    """What the agent loop says of a finished trajectory, as far as the log needs it."""
    session = scripted(name, TokenizerCodec(AutoTokenizer.from_pretrained(agent_dir)))
    question = Question(id=name, question=session.question, golden_answers=(town(name),))
    return {
        "trajectory": to_trajectory(session, question).to_dict(),
        "prompt": session.protocol.prompt(session.question),
        "segments": [
            {"by_model": part.by_model, "tokens": len(part.ids), "text": part.text} for part in session.segments
        ],
        "trained_tokens": sum(session.response_mask),
    }


@pytest.fixture(scope="module")
def training(agent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the rollouts of three steps."""
    folder = tmp_path_factory.mktemp("run") / "my_run"
    log = RolloutLog(folder / "rollouts")
    for step in (1, 2, 10):
        log.write(step, [rollout_line(outcome(name, agent_dir), step) for name in ("Ada", "Bo")])
    return folder


def test_the_log_is_what_verls_viewer_opens(training: Path) -> None:
    files = sorted((training / "rollouts").glob("*.jsonl"), key=lambda file: int(file.stem))  # as the viewer does
    assert [file.stem for file in files] == ["1", "2", "10"]
    for file in files:
        for line in read_jsonl(file):
            assert {"input", "output", "gts", "score", "step"} <= set(line)
            assert line["step"] == int(file.stem)
            assert line["output"] == "".join(segment["text"] for segment in line["segments"])


def test_later_steps_go_before_a_run_goes_on(training: Path, tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts")
    for step in (1, 2, 3):
        log.write(step, [{"step": step}])
    log.keep_until(2)
    log.write(2, [{"step": 2, "again": True}])
    assert log.steps() == [1, 2]
    assert log.read(2) == [{"step": 2, "again": True}]


class Colours(HTMLParser):
    """Collects the text of each class of span inside `pre`."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text: dict[str, str] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [str(values[name]) for name in ("href", "src") if name in values]
        if tag in ("span", "pre"):
            self.stack.append(str(values.get("class", tag)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("span", "pre"):
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "pre" in self.stack:
            self.text[self.stack[-1]] = self.text.get(self.stack[-1], "") + data


def test_the_page_colours_exactly_what_was_masked_and_needs_nothing_else(training: Path, tmp_path: Path) -> None:
    run(ShowRolloutsConfig(run=str(training), out=str(tmp_path / "page.html"), steps=[2]))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    colours = Colours()
    colours.feed(html)
    lines = RolloutLog(training / "rollouts").read(2)
    for by_model, colour in ((True, "model"), (False, "masked")):
        wanted = "".join(s["text"] for line in lines for s in line["segments"] if s["by_model"] is by_model)
        assert colours.text[colour] == wanted
    assert "Ada was born in" in colours.text["masked"] and "&lt;information&gt;" in html
    assert colours.links == [] and "<script" not in html and "url(" not in html
    assert "Step 2" in html and "Step 10" not in html


@pytest.mark.parametrize(("trained", "shown"), [(0, "100% masked"), (1_000_000, "0% masked")])
def test_the_page_says_what_was_trained_on_and_not_who_wrote_it(
    agent_dir: Path, tmp_path: Path, trained: int, shown: str
) -> None:
    item = outcome("Ada", agent_dir)
    item["trained_tokens"] = min(trained, sum(part["tokens"] for part in item["segments"]))
    RolloutLog(tmp_path / "rollouts").write(1, [rollout_line(item, 1)])
    run(ShowRolloutsConfig(run=str(tmp_path), out=str(tmp_path / "page.html")))
    assert shown in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_says_what_is_missing_and_overwrites_nothing(training: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected rollouts of step 7, found steps 1 to 10"):
        run(ShowRolloutsConfig(run=str(training), out=str(tmp_path / "a.html"), steps=[7]))
    with pytest.raises(ConfigError, match="found none"):
        run(ShowRolloutsConfig(run=str(tmp_path)))
    (tmp_path / "b.html").write_text("mine")
    with pytest.raises(OutputExistsError):
        run(ShowRolloutsConfig(run=str(training), out=str(tmp_path / "b.html")))


def test_the_batch_behind_a_broken_loss_says_where_it_is_not_finite(agent_dir: Path, tmp_path: Path) -> None:
    fields = {
        "advantages": [torch.tensor([0.5, -2.0]), torch.tensor([math.nan, 1.0])],
        "responses": [torch.tensor([4, 5]), torch.tensor([6, 7])],
    }
    metrics = {"actor/pg_loss": math.nan, "critic/vf_loss": 0.5}
    write_culprit(tmp_path / "c", ["a_0_0", "b_0_0"], fields, [outcome("Ada", agent_dir)], metrics, step=7)
    report = read_json(tmp_path / "c" / "report.json")
    assert report["not_finite"] == ["actor/pg_loss"]
    assert report["fields"]["advantages"] == {"min": -2.0, "max": 1.0, "not_finite_in": ["b_0_0"]}
    assert report["fields"]["responses"]["not_finite_in"] == []
    saved = torch.load(tmp_path / "c" / "batch.pt")
    assert saved["keys"] == ["a_0_0", "b_0_0"] and torch.equal(saved["fields"]["responses"][1], torch.tensor([6, 7]))
    (line,) = read_jsonl(tmp_path / "c" / "trajectories.jsonl")
    assert (line["step"], line["id"]) == (7, "Ada")
    assert json.dumps(report, allow_nan=False)
