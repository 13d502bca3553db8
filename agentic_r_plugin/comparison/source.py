"""The run of the loop from which an experiment takes models, data and settings. It is only read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.loop.settings import IterateConfig


class SourceRun:
    """A finished run, and the iteration whose data are used."""

    def __init__(self, folder: str, iteration: int) -> None:
        self.folder, self.iteration = Path(folder), iteration
        saved = load_config(IterateConfig, self.folder / "config.yaml")
        self.config = replace(saved, out=str(self.folder))  # it may have been moved
        self.phases = Phases(self.config)
        self.first_retriever = f"retriever-{iteration - 1}"
        """The retriever with which the iteration's data were made."""

    def model(self, name: str, kind: str) -> str:
        """Path of the run's `agent-K` or `retriever-K`.

        Raises:
            ConfigError: the name or the folder does not exist.
        """
        found, _, number = name.rpartition("-")
        if found != kind or not number.isdecimal():
            raise ConfigError(f"{name!r}: expected {kind}-K, a {kind} of the run {self.folder}")
        path = str(getattr(self.phases, kind)(int(number)))
        if path != getattr(self.config, kind) and not Path(path).is_dir():
            raise ConfigError(f"{name}: the run has no {path}")
        if int(number) > self.config.iterations:  # without PPO, every agent-K is the given one
            raise ConfigError(f"{name}: the run {self.folder} has {self.config.iterations} iterations")
        return path

    def data(self, name: str) -> Path:
        """Output of a data stage."""
        return self.phases.data(self.iteration, name)

    def require_data(self, where: str, *names: str) -> None:
        """Raise ConfigError, which names the setting `where`, if the run lacks one of these outputs."""
        for name in names:
            if not self.data(name).exists():
                raise ConfigError(f"{where}: the run has no {self.data(name)}")

    def stage(self, name: str, url: str = "") -> Any:
        """The run's settings of a data stage."""
        k = self.iteration
        return self.phases.stage(k, name, self.model(f"agent-{k}", "agent"), url)
