"""`agentic-r COMMAND [--config FILE] [key=value ...] [--resume]`: every step of the method as one command.

A command is a typed configuration and a function. The fields of the configuration are its flags. A command may have two
words (`convert questions`). Heavy packages are imported only once the command is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from agentic_r_plugin import __version__, components, memory
from agentic_r_plugin.credentials import redacted
from agentic_r_plugin.errors import AgenticRError, ConfigError


@dataclass(frozen=True)
class Command:
    """A command: its help, and its configuration as `module:Config`, with the function `run` in the same module."""

    help: str
    config: str
    package: str = "agentic_r_plugin"

    def load(self) -> tuple[type, Any]:
        """(configuration class, run function)."""
        module_name, _, config_name = self.config.partition(":")
        module = importlib.import_module(f"{self.package}.{module_name}")
        return getattr(module, config_name), module.run


COMMANDS = {
    "world": Command("write the generated benchmark in FlashRAG layout", "world.generate:WorldConfig"),
    "index": Command("encode a corpus and build the search index", "search.indexing.index:IndexConfig"),
    "convert questions": Command("convert questions of any format to FlashRAG's", "convert.questions:QuestionsConfig"),
    "convert corpus": Command("cut documents and articles into passages", "convert.corpus:CorpusConfig"),
    "convert trajectories": Command(
        "convert logs of other agents to trajectories", "convert.trajectories:ConvertTrajectoriesConfig"
    ),
    "convert groups": Command("export training groups for other trainers", "convert.groups:ConvertGroupsConfig"),
    "convert runs": Command("export TREC or BrowseComp-Plus runs", "convert.runs:ConvertRunsConfig"),
    "convert qrels": Command("export gold documents or relevance as TREC qrels", "convert.qrels:ConvertQrelsConfig"),
    "coverage": Command("measure which answers a corpus holds and a retriever finds", "search.coverage:CoverageConfig"),
    "repair": Command("add missing gold documents to a corpus and its index", "search.indexing.repair:RepairConfig"),
    "serve": Command("run the retrieval service", "search.service.server:ServeConfig"),
    "train-agent": Command("PPO in verl; further overrides go to verl", "agent.launch:TrainAgentConfig"),
    "show-rollouts": Command("show a training's trajectories as an HTML page", "agent.rollout_page:ShowRolloutsConfig"),
    "trajectories": Command("let the agent answer every question", "data.trajectories:TrajectoriesConfig"),
    "candidates": Command("retrieve 20 passages for every query", "data.candidates:CandidatesConfig"),
    "sub-answers": Command("let a judge name the fact that each query looked for", "data.sub_answers:SubAnswersConfig"),
    "relevance": Command("score the relevance of the candidates", "data.relevance:RelevanceConfig"),
    "correctness": Command("continue from single candidates; check the answer", "data.correctness:CorrectnessConfig"),
    "groups": Command("select positives and negatives", "data.groups:GroupsConfig"),
    "data-report": Command("summarise the data and their cost", "data.report:DataReportConfig"),
    "train-retriever": Command("train the retriever on the groups", "retriever.training:TrainRetrieverConfig"),
    "train-reranker": Command("train a cross-encoder on scored candidates", "retriever.reranker:TrainRerankerConfig"),
    "evaluate": Command("agent x retriever x benchmark through FlashRAG", "evaluation.evaluate:EvaluateConfig"),
    "experiment": Command("compare retrievers made in several ways from one run's data", "experiment:ExperimentConfig"),
    "aggregate": Command("merge the matrices of several seeds", "evaluation.aggregate:AggregateConfig"),
    "iterate": Command("run the whole loop, K times (Algorithm 1)", "iterate:IterateConfig"),
    "report": Command("write report.html and report.md of a run", "report.report:ReportConfig"),
}

GROUPS = {"convert": "import other data; export training sets and runs"}
"""Commands of two words: first word -> help."""


def main(arguments: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Entry point. Returns the exit code, which is 0 only if the work is complete."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = [item for item in arguments if not item.startswith("-")]
    name = next((item for item in (" ".join(words[:2]), *words[:1]) if item in commands), None)
    debug, called = "--debug" in arguments, f"agentic-r {name or 'components'}"
    _prepare_upstream()
    try:
        if name is None:
            options = parser.parse_args(arguments)
            list_components(as_json=options.json)
            return 0
        config_class, run = commands[name].load()
        given = arguments[arguments.index(name.split()[-1]) + 1 :]
        options, overrides = parse_command(name, config_class, given)
        config = build_config(config_class, options, overrides)
        from agentic_r_plugin.child import family

        with family():
            run(config, resume=options.resume)
        return 0
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            print(f"{called}: terminated; finished work is kept, continue with --resume", file=sys.stderr)
            return error.code
        raise
    except KeyboardInterrupt:
        print(f"{called}: interrupted; finished work is kept, continue with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            hint = "" if isinstance(error, AgenticRError) else " (--debug shows where)"
            print(f"{called}: {_paragraph(error)}{hint}", file=sys.stderr)
        return 1


def _paragraph(error: Exception) -> str:
    """What a user reads of an error: no traceback, no secret."""
    if isinstance(error, AgenticRError):
        return redacted(str(error))
    if isinstance(error, OSError) and error.strerror:  # a full disk, a path that cannot be
        where = f"{error.filename}: " if error.filename else ""
        return redacted(where + error.strerror)
    return f"unexpected {type(error).__name__}: {redacted(str(error))}"


@contextmanager
def reported(script: str) -> Iterator[None]:
    """For a script of a recipe: the errors that a user can mend end it with one paragraph and exit status 1.

    Raises:
        SystemExit: the body raised AgenticRError or OSError.
    """
    try:
        yield
    except (AgenticRError, OSError) as error:
        raise SystemExit(f"{script}: {_paragraph(error)}") from error


def _prepare_upstream() -> None:
    """Bound the caches of upstream packages, and silence their import warnings and weight-loading bars."""
    memory.bound_caches()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message=".* engine is not available", category=UserWarning)


def build_parser() -> argparse.ArgumentParser:
    """The outer parser for help, version and `components`. All other commands have their own parsers."""
    parser = argparse.ArgumentParser(
        prog="agentic-r", description="Agentic-R: learning to retrieve for agentic search."
    )
    parser.add_argument("--version", action="version", version=f"agentic-r {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing = commands.add_parser("components", help="list registered components")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    kinds: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        first, _, kind = name.partition(" ")
        if kind and first not in kinds:
            kinds[first] = commands.add_parser(first, help=GROUPS[first], description=GROUPS[first]).add_subparsers(
                dest="kind", metavar="KIND", required=True
            )
        (kinds[first] if kind else commands).add_parser(kind or name, help=command.help)
    return parser


def parse_command(name: str, config_class: type, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of one command (the fields of its configuration) and its `key=value` overrides."""
    parser = argparse.ArgumentParser(
        prog=f"agentic-r {name}",
        description=(config_class.__doc__ or "").strip().partition("\n")[0],
        epilog="Every field, nested ones too, can also be given as key=value (a.b=value).",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with these fields")
    parser.add_argument("--resume", action="store_true", help="continue an existing output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for field in dataclasses.fields(config_class):
        _add_flag(parser, config_class, field)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides")
    options, rest = parser.parse_known_intermixed_args(arguments)
    unknown = [item for item in rest if item.startswith("--")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, [*options.overrides, *rest]


def _add_flag(parser: argparse.ArgumentParser, config_class: type, field: dataclasses.Field[Any]) -> None:
    hint = get_type_hints(config_class)[field.name]
    options = [item for item in get_args(hint) if item is not type(None)] if type(None) in get_args(hint) else [hint]
    several = hint == list[str] and "flag" in field.metadata
    if several:
        options = [str]
    if options[0] not in (str, int, float, bool):
        return  # lists and nested settings are given as key=value
    kind = options[0]
    flag = field.metadata.get("flag") or "--" + field.name.strip("_").replace("_", "-")
    shown = "" if field.default in (dataclasses.MISSING, None, "", "???") else f" (default: {field.default})"
    arguments: dict[str, Any] = {
        "dest": f"field:{field.name}",
        "default": None,
        "help": (str(field.metadata.get("help", "")) + shown).replace("%", "%%"),
    }
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **arguments)
    else:
        action = "append" if several else "store"
        parser.add_argument(flag, action=action, metavar=kind.__name__.upper(), **arguments)


def build_config(config_class: type, options: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """Build the configuration from the defaults, the file, flags and overrides; later ones win.

    If the configuration has a list field `verl`, overrides that are not its fields go to verl: `critic` is a
    field of `train-agent`, `critic.optim.lr` a key of verl.
    """
    from agentic_r_plugin.config import load_config

    fields = {field.name for field in dataclasses.fields(config_class)}
    for_verl = "verl" in fields
    flags = {
        key.removeprefix("field:"): value
        for key, value in vars(options).items()
        if key.startswith("field:") and value is not None
    }
    for item in overrides:
        if "=" not in item and not (for_verl and item.startswith("~")):  # Hydra's way to delete a key
            raise ConfigError(f"argument {item!r}: expected key=value")
    # `in` is a keyword of Python, so its field is `in_`
    overrides = [item.replace("=", "_=", 1) if item.partition("=")[0] + "_" in fields else item for item in overrides]
    hints = get_type_hints(config_class)

    def is_ours(item: str) -> bool:
        name, _, inner = item.partition("=")[0].partition(".")
        hint = hints.get(name)
        return name in fields and (not inner or dataclasses.is_dataclass(hint) or get_origin(hint) is dict)

    ours = [item for item in overrides if not for_verl or is_ours(item)]
    passed_on = [item for item in overrides if item not in ours]
    return load_config(
        config_class, options.config, ours, values=flags, append={"verl": passed_on} if passed_on else {}
    )


def list_components(*, as_json: bool) -> None:
    """Print the registered components: kind, name, package and a one-line description."""
    rows = [
        {"kind": item.kind, "name": item.name, "package": item.package, "description": components.describe(item)}
        for item in components.components()
    ]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    widths = {key: max(len(row[key]) for row in rows) for key in ("kind", "name", "package")} if rows else {}
    for row in rows:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()) + "  " + row["description"])


if __name__ == "__main__":
    sys.exit(main())
