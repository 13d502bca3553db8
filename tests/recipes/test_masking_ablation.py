"""The masking ablation's table and curves, from made-up steps; its trainings are `agent.launch`'s own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "agentic_r" / "cpu" / "masking_ablation.py"


@pytest.fixture(scope="module")
def ablation() -> Any:
    spec = importlib.util.spec_from_file_location("masking_ablation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(ablation: Any) -> list[dict[str, Any]]:
    """Two runs of four steps; validation before the first and after the last."""
    found = []
    for arm, rise in (("masked", 0.1), ("not masked", -0.1)):
        for step in range(5):
            record: dict[str, Any] = {"step": step}
            if step:
                record |= {"agentic_r/em": 0.4 + rise * step, "agentic_r/search_turns": 2.0, "actor/grad_norm": None}
            if step in (0, 4):
                record["val-core/fictional_world/acc/mean@1"] = 0.3 + rise * step / 2
            found.append(ablation.curve_line(arm, 0, record, "stopped" if arm == "not masked" else ""))
    return found


def test_the_table_shows_first_and_last_quarter_and_validation(ablation: Any) -> None:
    header, _, masked, bare = ablation.table(lines(ablation)).splitlines()
    assert header.startswith("| arm | seed | steps | reward (EM): first quarter -> last |")
    assert masked.startswith("| masked | 0 | 4 | 0.500 -> 0.800 | 2.000 -> 2.000 |")
    assert masked.endswith("| 0.300 -> 0.500 |")
    assert bare.startswith("| not masked | 0 | 4 (stopped) | 0.300 -> 0.000 |")


def test_the_curves_are_one_svg_with_a_curve_for_each_run(ablation: Any) -> None:
    root = ElementTree.fromstring(ablation.chart(lines(ablation)))
    panels = root.findall("{http://www.w3.org/2000/svg}svg")
    assert [panel.get("aria-label") for panel in panels] == ["reward (EM)", "searches", "validation EM"]
    for panel in panels:
        curves = panel.findall("{http://www.w3.org/2000/svg}g")
        assert [curve.get("class") for curve in curves] == ["c0", "c1"]
