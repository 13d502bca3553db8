"""What an agent folder says of itself, and what the settings overrule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.evaluation.settings import (
    AgenticRSettings,
    LimitOverrides,
    read_agent_card,
    read_settings,
    resolve_agent,
)
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.tags import compact, search_r1

RECIPES = Path(__file__).parents[2] / "recipes"


def card(folder: Path, **content: object) -> Path:
    (folder / "agent.json").write_text(json.dumps(content))
    return folder


def test_an_agent_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    found = read_agent_card(card(tmp_path, protocol="compact", limits={"max_searches": 4}, topk=2, steps=40))
    assert resolve_agent(AgenticRSettings(), found) == (compact, Limits(max_searches=4), 2)


def test_settings_overrule_the_card_one_by_one(tmp_path: Path) -> None:
    found = read_agent_card(card(tmp_path, protocol="compact", limits={"max_searches": 4}, topk=2))
    settings = AgenticRSettings(topk=5, limits=LimitOverrides(max_tokens=900))
    assert resolve_agent(settings, found) == (compact, Limits(max_searches=4, max_tokens=900), 5)


def test_a_folder_without_a_card_gets_the_defaults(tmp_path: Path) -> None:
    assert read_agent_card(tmp_path) is None and read_agent_card("") is None
    assert resolve_agent(AgenticRSettings(), None) == (search_r1, Limits(), 3)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"limits": {"max_search": 4}}', ConfigError, r"agent\.json: .*max_search"),
        ("[1]", ConfigError, r"agent\.json: expected an object"),
        ("{", RecordError, r"agent\.json: expected JSON"),
    ],
)
def test_a_wrong_card_is_an_error_with_its_place(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "agent.json").write_text(content)
    with pytest.raises(error, match=message):
        read_agent_card(tmp_path)


def test_settings_must_be_a_mapping_of_possible_values() -> None:
    assert read_settings({"agentic_r": None}) == AgenticRSettings()
    with pytest.raises(ConfigError, match="expected a mapping, found list"):
        read_settings({"agentic_r": [3]})
    with pytest.raises(ConfigError, match=r"agentic_r\.topk: expected at least 1, found 0"):
        read_settings({"agentic_r": {"topk": 0}})


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/evaluate.yaml")))
def test_every_evaluation_recipe_is_a_valid_configuration(recipe: Path) -> None:
    values = {"out": "x", "data_dir": "x", "agents": {"a": "x"}, "searches": {"r": "x"}}
    assert load_config(EvaluateConfig, recipe, values=values).benchmarks
