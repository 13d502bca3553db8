"""The documentation: generated pages are up to date, links lead somewhere. Code blocks: `test_blocks.py`."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "agentic_r_plugin/**/*.md", "recipes/**/*.md", "patches/*.md")
PAGES = sorted({path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place)})


@pytest.mark.parametrize("page", ["settings", "formats"])
def test_generated_pages_are_what_the_code_says(page):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    kept, made = generate[page.upper()].read_text(encoding="utf-8"), generate[f"{page}_page"]()
    assert kept == made, "run python docs/generate.py"


def test_tables_and_figures_of_the_results_are_those_of_the_kept_experiments():
    results = runpy.run_path(str(ROOT / "docs" / "results.py"))
    text, figures = results["PAGE"].read_text(encoding="utf-8"), results["figures"]()
    assert text == results["page"](), "run python docs/results.py"
    assert {name: (results["KEPT"] / name).read_text(encoding="utf-8") for name in figures} == figures


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [t for t in targets if t and "://" not in t and not (ROOT / page).parent.joinpath(t).exists()] == []


def test_the_table_of_forms_and_commands_names_what_is_run():
    from tests import test_corpus_forms, test_question_forms

    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for what, module in (("questions", test_question_forms), ("corpora", test_corpus_forms)):
        assert f"| {what} | {', '.join(module.FORMS)} | {', '.join(module.READERS)} |" in page
