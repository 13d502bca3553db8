"""The documentation: generated pages are up to date, code blocks are real code, links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", ["settings", "formats"])
def test_generated_pages_are_what_the_code_says(page):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    kept, made = generate[page.upper()].read_text(encoding="utf-8"), generate[f"{page}_page"]()
    assert kept == made, "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile_and_blocks_that_name_a_file_are_that_file(page):
    for language in ("python", "toml"):
        for block in blocks(page, language):
            first, _, rest = block.partition("\n")
            if language == "python":
                compile(block, page, "exec")
            if (named := first.removeprefix("# ")) != first and (ROOT / named).is_file():
                assert rest == (ROOT / named).read_text(encoding="utf-8"), f"{page} shows another {named}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [t for t in targets if t and "://" not in t and not (ROOT / page).parent.joinpath(t).exists()] == []
