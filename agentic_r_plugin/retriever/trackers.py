"""The training log in experiment trackers: Weights & Biases, TensorBoard, trackio, MLflow, ... through `accelerate`.

The project is `agentic-r` (or `WANDB_PROJECT`) and the run has the name of the output folder. Everything else, such as
server and offline mode, comes from the tracker's own environment variables. A resumed training is a new run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from agentic_r_plugin.errors import ConfigError

PROJECT, TENSORBOARD_FOLDER = "agentic-r", "runs"
"""The hub looks for TensorBoard's files in the folder `runs` of a model."""

_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
"""Tracker -> its option for the name of the run."""


class Trackers:
    """Trackers by name; none are started outside `running`.

    Raises:
        ConfigError: unknown name, or the tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._running: list[Any] = []
        if names:
            from accelerate.tracking import get_available_trackers

            known = [str(name) for name in get_available_trackers()]
            if missing := [name for name in names if name not in known]:
                raise ConfigError(
                    f"loggers: no tracker {', '.join(missing)}; installed are {', '.join(known) or 'none'}"
                )

    @contextmanager
    def running(self, out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
        """Start the trackers for the training of `out`, and close them at the end. For process 0 only."""
        with ExitStack() as stack:
            stack.callback(self._running.clear)
            for name in self._names:
                self._running.append(tracker := _start(name, out, settings))
                stack.callback(tracker.finish)
            yield

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of the training log, with the step that it names."""
        part = "train" if "loss" in line else "eval"
        values = {f"{part}/{name}": value for name, value in line.items() if name != "step" and value is not None}
        for tracker in self._running:
            tracker.log(values, step=line["step"])


def _start(name: str, out: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    threads = torch.get_num_threads()
    PartialState(cpu=True)  # trackers need it; in a process group it may change the number of threads
    torch.set_num_threads(threads)
    kind = LOGGER_TYPE_TO_CLASS[name]
    project = TENSORBOARD_FOLDER if name == "tensorboard" else os.environ.get("WANDB_PROJECT", PROJECT)
    folder = [str(out)] if kind.requires_logging_directory else []
    tracker = kind(project, *folder, **({_RUN_NAME[name]: out.name} if name in _RUN_NAME else {}))
    tracker.start()
    tracker.store_init_configuration(
        {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
    )
    return tracker
