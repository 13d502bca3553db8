"""The benchmarks of an experiment: links to the run's and to others, and generated worlds, in one folder."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.comparison.settings import ExperimentConfig
from agentic_r_plugin.comparison.source import SourceRun
from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.evaluation.benchmarks import QUESTION_SUFFIXES
from agentic_r_plugin.search.corpus import corpus_file
from agentic_r_plugin.world import generate


class Benchmarks:
    """The benchmarks of an experiment. `main` is the name of the run's own."""

    def __init__(self, config: ExperimentConfig, run: SourceRun) -> None:
        self.config, self.run = config, run
        self.folder = Path(config.out) / "benchmarks"
        self.main = run.phases.benchmark.name

    def check(self) -> None:
        """Raise ConfigError if a world has a wrong setting or a benchmark does not exist."""
        for name in self.config.worlds:
            self._world(name)
        for name, folder in self.config.benchmarks.items():
            if not Path(folder).is_dir():
                raise ConfigError(f"benchmarks.{name}: {folder}: no such folder")

    def compared(self) -> list[str]:
        """Names of the benchmarks in the comparison."""
        of_run = self.run.config.evaluate.get("benchmarks", [self.main])
        return list(dict.fromkeys([*of_run, *self.config.benchmarks, *self.config.worlds]))

    def corpus(self, name: str) -> Path:
        """The corpus of a benchmark (a link, also to a packed one)."""
        return self.folder / name / "corpus.jsonl"

    def gather(self) -> None:
        """Collect all benchmarks by linking or generating them."""
        given = {name: Path(folder) for name, folder in self.config.benchmarks.items()}
        for name, folder in ({self.main: self.run.phases.benchmark} | self._evaluated_by_run() | given).items():
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            own = corpus_file(folder)
            # The run may name a corpus outside its benchmark; benchmarks without a corpus are searched in the run's.
            link(self.corpus(name), own if name != self.main and own.is_file() else self.run.phases.corpus)
            for file in sorted(folder.iterdir()):
                if file.name.endswith(QUESTION_SUFFIXES) and not file.name.startswith(("corpus.", ".")):
                    link(self.folder / name / file.name, file)
        for name in self.config.worlds:
            generate.run(self._world(name), resume=True)

    def _evaluated_by_run(self) -> dict[str, Path]:
        """The benchmarks that the run's own evaluation names, without the run's benchmark."""
        own = self.run.config.evaluate
        folder = Path(own.get("data_dir", self.run.phases.benchmark.parent))
        return {name: folder / name for name in own.get("benchmarks", []) if name != self.main}

    def _world(self, name: str) -> generate.WorldConfig:
        values = to_dict(self.run.config.world) | (self.config.worlds[name] or {})
        return load_config(generate.WorldConfig, values=values | {"out": str(self.folder), "name": name})


def link(path: Path, target: Path) -> None:
    """Link to a file or folder of the run or a benchmark. A broken link (the target was moved) is replaced.

    Raises:
        ConfigError: the target does not exist.
        ManifestMismatchError: the link exists and points to another target.
    """
    if not target.exists():
        raise ConfigError(f"{target} does not exist, but the run or a benchmark needs it")
    if path.exists() and path.resolve() != target.resolve():
        raise ManifestMismatchError(
            f"{path}: links to {path.resolve()}, expected {target.resolve()}; choose another out"
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target.resolve())
