"""Every code block of the pages is run, or checked by the code that it is for.

| block | check |
|---|---|
| Python | run; one that names a file is that file, which `test_example_plugin.py` installs and uses |
| TOML | is the file that it names |
| YAML | read as settings of the loop |
| JSON | parsed, each line |
| shell: `agentic-r` | parsed by the real command line into settings; protocols are loaded, loops are composed |
| shell: scripts, make, pip, curl | files, flags, targets, extras and bodies exist or are valid |

A block or program that cannot be run here is in `NOT_RUN` or `OTHER_PROGRAMS`, with the reason.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from agentic_r_plugin import cli, iterate
from agentic_r_plugin.comparison.settings import parts
from agentic_r_plugin.config import load_config
from agentic_r_plugin.loop import checks
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.protocol import load_protocol

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "agentic_r_plugin/**/*.md", "recipes/**/*.md", "patches/*.md")
PAGES = sorted({path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place)})

NOT_RUN = {
    ("README.md", "from flashrag.config import Config"): "needs HotpotQA, an agent and an index; "
    "tests/evaluation/test_pipeline.py makes the same calls on a toy benchmark"
}
"""(page, first line) -> why the block is only compiled."""

OTHER_PROGRAMS = {
    "vllm": "vLLM's server, which is not installed here",
    "hf": "downloads from the Hugging Face hub",
    "unzip": "unpacks what was downloaded",
}

REST = {"evaluate": ["out=x", "data_dir=x", "benchmarks=[b]", "agents.a=x", "searches.s=x"]}
"""Command -> what replaces `...`, where required settings alone are not enough."""


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


@pytest.mark.parametrize("block", [pytest.param(one, id=f"{one.page}:{one.line}") for one in blocks()])
def test_every_block_does_what_it_says(block: Block, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if block.language in ("python", "toml") and (named := ROOT / block.first.removeprefix("# ")).is_file():
        assert block.text.partition("\n")[2] == named.read_text(encoding="utf-8"), f"the page shows another {named}"
    elif block.language == "python":
        code = compile(block.text, block.page, "exec")
        if reason := NOT_RUN.get((block.page, block.first)):
            pytest.skip(reason)
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})  # dataclasses look their module up
    elif block.language == "yaml":
        (tmp_path / "block.yaml").write_text(block.text, encoding="utf-8")
        load_config(iterate.IterateConfig, tmp_path / "block.yaml", ["out=x", "agent=x", "retriever=x"])
    elif block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    else:
        assert block.language == "bash", "expected python, toml, yaml, json or bash after the ```"
        for words in commands(block.text):
            check(words)


# --- Shell ------------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, without comments, words of loops, and variables set for one command."""
    variables: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        parts: list[list[str]] = [[]]
        for word in lexer:
            if set(word) <= set(";&|"):
                parts.append([])
            else:
                parts[-1] += variables.get(word, [word])
        for words in parts:
            while words and (words[0] in ("until", "do", "done") or re.match(r"\w+=", words[0])):
                name, _, value = words.pop(0).partition("=")
                variables[f"${name}"] = shlex.split(value)
            if words:
                yield words


def check(words: list[str]) -> None:
    program, *arguments = words
    if program == "agentic-r":
        name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in cli.COMMANDS else arguments[0]
        check_settings(name, cli.COMMANDS[name], arguments[len(name.split()) :])
    elif program == "torchrun":
        check(arguments[arguments.index("--no-python") + 1 :])
    elif Path(program).name == "python":
        check_python(arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", Path("Makefile").read_text(encoding="utf-8"), re.M)
    elif Path(program).name == "pip":
        extras = load_toml("pyproject.toml")["project"]["optional-dependencies"]
        for wanted in re.findall(r"(?:\.|agentic-r-plugin)\[(.*?)\]", " ".join(arguments)):
            assert set(wanted.split(",")) <= extras.keys()
    elif program == "curl":
        bodies = [body for flag, body in pairwise(arguments) if flag == "-d"]
        assert all(isinstance(json.loads(body), dict) for body in bodies)
    elif program.endswith(".sh"):
        assert os.access(program, os.X_OK), f"{program}: no such script"
    elif program != "sleep":
        assert program in OTHER_PROGRAMS, f"{program}: a program that this test does not know"


def load_toml(name: str) -> dict:
    tomllib = importlib.import_module("tomllib" if importlib.util.find_spec("tomllib") else "tomli")
    return tomllib.loads(Path(name).read_text(encoding="utf-8"))


def check_settings(name: str, command: cli.Command, arguments: list[str]) -> None:
    """Build the settings as the command does, and what can be built from them without files and models."""
    config_class, _ = command.load()
    given = [word for word in arguments if word not in ("...", "…")]
    options, overrides = cli.parse_command(name, config_class, given)
    if given != arguments:
        set_already = {word.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_") for word in given}
        needed = [item for item in dataclasses.fields(config_class) if item.default in (dataclasses.MISSING, "???")]
        missing = [item.name for item in needed if item.default_factory is dataclasses.MISSING]
        rest = REST.get(name, [f"{one.strip('_')}=x" for one in missing])
        overrides += [one for one in rest if one.partition("=")[0].partition(".")[0] not in set_already]
    config = cli.build_config(config_class, options, overrides)
    chosen = getattr(config, "settings", config)
    if isinstance(getattr(chosen, "protocol", None), str):
        load_protocol(chosen.protocol, getattr(chosen, "protocol_options", {}))
    if hasattr(config, "check") and given == arguments:
        config.check()
    if isinstance(config, iterate.IterateConfig):
        checks.check_settings(Phases(config))
    if name == "experiment":
        assert list(parts(config))


def check_python(arguments: list[str]) -> None:
    """A module or script of this repository exists and has the flags, and all that it requires are given."""
    if arguments[0] == "-W":
        arguments = arguments[2:]
    if arguments[0] == "-m":
        target, given = Path(arguments[1].replace(".", "/")), arguments[2:]
        if arguments[1] == "pytest":
            assert all(Path(word).exists() for word in given if not word.startswith("-"))
            return
        if target.is_dir():
            command = importlib.import_module(f"{arguments[1]}.__main__").COMMAND
            check_settings("warm-start", command, given)
            return
        target = target.with_suffix(".py")
    else:
        target, given = Path(arguments[0]), arguments[1:]
    calls = [node for node in ast.walk(ast.parse(target.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    flags = {
        str(ast.literal_eval(call.args[0])): "required" in {word.arg for word in call.keywords}
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
    }
    used = {word.partition("=")[0] for word in given if word.startswith("--")}
    assert used <= flags.keys(), f"{target} has no {sorted(used - flags.keys())}"
    missing = {flag for flag, required in flags.items() if required and flag.startswith("--")} - used
    assert not missing, f"{target} requires {sorted(missing)}"
