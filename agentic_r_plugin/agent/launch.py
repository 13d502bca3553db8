"""`agentic-r train-agent`: PPO training of the agent in verl, in a separate process (method section 6).

A run folder (`storage.claim`) holds `config.yaml` and `verl.yaml` (resolved), `data/`, `train.log`, `metrics.jsonl`
(one line per step; line 0 is the validation before the first step), `last_step.json` (the last trained step's metrics),
`rollouts/` (sampled trajectories of each step) and `checkpoints/`. A finished run adds `stability.json` (the chosen
checkpoint and the reason), `agent/` (a plain Hugging Face folder with `agent.json`), `critic/`, and, written last,
`done.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agentic_r_plugin.agent import dataset, verl_config
from agentic_r_plugin.agent.checkpoints import latest_step, name_latest
from agentic_r_plugin.agent.critic import write_critic
from agentic_r_plugin.agent.prepare import Prepared, precision, prepare, run_output
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.agent.worker import FAULT, STABILITY
from agentic_r_plugin.child import end
from agentic_r_plugin.config import save_config
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.progress import duration
from agentic_r_plugin.storage.claim import Claim, require_new
from agentic_r_plugin.store import StepLog, read_json, write_json

__all__ = ["TrainAgentConfig", "run"]

_LOG_TAIL_LINES = 25


def run(config: TrainAgentConfig, *, resume: bool = False) -> None:
    """Train or resume training, then export the agent.

    Raises:
        ConfigError, RecordError: invalid settings, missing or broken files; nothing is written.
        SearchError: the retrieval service does not answer or refuses to search; nothing is written.
        OutputExistsError: the run folder exists and `resume` is False, or another process is writing to it.
        ManifestMismatchError: the run folder belongs to a different run, or is not one of a training.
        TrainingError: training stopped; the message is ours or the end of the log. The folder can be resumed.
    """
    if config.dry_run:
        from agentic_r_plugin.agent import dry_run

        return dry_run.run(config)
    # Before `run_output`, which reads all inputs for their fingerprints.
    if not resume:
        require_new(config.out, folder=True)
    with run_output(config).claim(resume=resume) as held:
        # A finished run goes on if `steps` was raised, unless the stability rule stopped it.
        if (done := held.finished) is not None and (latest_step(held.out) >= config.steps or done["stopped"]):
            print(f"train-agent: {held.out} is done", file=sys.stderr)
            return
        prepared = prepare(config)
        # done.json means done (`storage.claim`); the others describe an earlier attempt.
        for stale in (FAULT, STABILITY, "done.json"):
            (held.out / stale).unlink(missing_ok=True)
        held.begin()
        _write_inputs(held.out, config, prepared)
        _train(held, config, prepared.environment)
        _finish(held, config)


def _write_inputs(run_dir: Path, config: TrainAgentConfig, prepared: Prepared) -> None:
    data = run_dir / "data"
    # Files that exist are kept: a resume has the same questions and the same model (`run_output`).
    for name, questions in (("train", prepared.questions.training), ("validation", prepared.questions.validation)):
        if questions is not None and not (data / f"{name}.parquet").is_file():
            dataset.write_parquet(data / f"{name}.parquet", questions, prepared.protocol)
    zero_critic = run_dir / verl_config.ZERO_CRITIC
    if verl_config.starts_from_zero_critic(config) and not zero_critic.is_dir():
        write_critic(Path(config.model), zero_critic)
    # Written at every start: settings that do not change the result may differ.
    (run_dir / "agent_loop.yaml").write_text(prepared.loop, encoding="utf-8")
    OmegaConf.save(prepared.verl, run_dir / "verl.yaml")
    save_config(config, run_dir / "config.yaml")


# --- During training --------------------------------------------------------------------------------------------------


def _train(held: Claim, config: TrainAgentConfig, environment: dict[str, str | None]) -> None:
    """Run the training process and report each step; add the elapsed seconds to the manifest.

    The process inherits the lock of the run folder. While it lives, no other process can start on the folder, even if
    this one has ended.
    """
    run_dir = held.out
    name_latest(run_dir)
    # Steps after the checkpoint are repeated; their old lines would be reported as new steps.
    StepLog(run_dir / "metrics.jsonl").keep_until(latest_step(run_dir))
    debug = "--debug" in sys.argv
    started = time.monotonic()
    with (run_dir / "train.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "agentic_r_plugin.agent.worker", str(run_dir), str(os.getpid())],
            stdout=None if debug else log,
            stderr=subprocess.STDOUT if not debug else None,
            env={name: value for name, value in {**os.environ, **environment}.items() if value is not None},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
            pass_fds=[held.lock.fileno()],
        )
        try:
            _follow(run_dir, config, process)
        finally:
            end(process)
            held.note(seconds=held.noted("seconds", 0.0) + time.monotonic() - started)
    if process.returncode:
        raise TrainingError(_why(run_dir, process.returncode))


def _follow(run_dir: Path, config: TrainAgentConfig, process: subprocess.Popen[bytes]) -> None:
    """Print one line per new step until the process ends."""
    log = StepLog(run_dir / "metrics.jsonl")
    shown = max((record["step"] for record in log.read()), default=-1)
    took: list[float] = []
    read_bytes = -1
    while True:
        ended = process.poll() is not None  # polled before reading: lines written just before the exit are still shown
        size = log.path.stat().st_size if log.path.is_file() else -1
        for record in log.read() if size != read_bytes else ():  # parsed only if it has grown
            if record["step"] > shown:
                shown = record["step"]
                took += [record["timing_s/step"]] if record.get("timing_s/step") else []
                print(progress_line(record, config.steps, took), file=sys.stderr, flush=True)
        read_bytes = size
        if ended:
            return
        time.sleep(0.5)


def progress_line(record: dict[str, Any], steps: int, took: Sequence[float] = ()) -> str:
    """Format one step for the terminal; given the seconds of earlier steps, add the estimated time left.

    >>> progress_line({"step": 2, "agentic_r/em": 0.25, "agentic_r/search_turns": 1.5, "timing_s/step": 8.04}, 10)
    'step 2/10  EM 0.250  searches 1.50  8.0 s'
    >>> progress_line({"step": 4, "timing_s/step": 30.0}, 10, [20.0, 30.0])
    'step 4/10  30.0 s  about 2 min 30 s left'
    """
    named = (("EM", "agentic_r/em", ".3f"), ("searches", "agentic_r/search_turns", ".2f"))
    parts = [f"step {record['step']}/{steps}"]
    parts += [f"{name} {record[key]:{form}}" for name, key, form in named if record.get(key) is not None]
    validated = next((key for key in record if key.startswith("val-core/") and "/acc/" in key), None)
    if validated is not None and record[validated] is not None:
        parts.append(f"validation EM {record[validated]:.3f}")
    if record.get("timing_s/step") is not None:
        parts.append(f"{record['timing_s/step']:.1f} s")
    if took and record["step"] < steps:
        parts.append(f"about {duration((steps - record['step']) * statistics.fmean(took))} left")
    return "  ".join(parts)


def _why(run_dir: Path, code: int) -> str:
    if (run_dir / FAULT).is_file():
        return str(read_json(run_dir / FAULT)["message"])
    log = run_dir / "train.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return f"the training process ended with code {code}; the end of {log}:\n" + "\n".join(lines)


# --- After training ---------------------------------------------------------------------------------------------------


def _finish(held: Claim, config: TrainAgentConfig) -> None:
    run_dir = held.out
    chosen = read_json(run_dir / STABILITY)
    agent = {
        "schema": "agent/1",
        "protocol": config.protocol,
        "limits": asdict(config.limits),
        "topk": config.topk,
        "step": chosen["checkpoint"],
        "parent": str(Path(config.model).resolve()),
        "checkpoint": "last" if chosen["collapse"] is None else "last stable",
    }
    if config.protocol_options:
        agent["protocol_options"] = config.protocol_options
    write_json(run_dir / "agent" / "agent.json", agent)
    metrics = StepLog(run_dir / "metrics.jsonl").read()
    done = {
        "step": chosen["checkpoint"],
        "stopped": chosen["stopped"],
        "seconds": round(held.noted("seconds"), 1),
        "step_seconds": round(sum(record.get("timing_s/step") or 0 for record in metrics), 1),
        "agent": "agent",
        "precision": precision(config),
        "critic": "critic" if (run_dir / "critic").is_dir() else None,
    }
    held.finish(done)
    if chosen["collapse"] is not None:
        print(f"train-agent: {chosen['verdict']}; step {chosen['checkpoint']} was exported", file=sys.stderr)
    print(f"train-agent: {json.dumps(done)}", file=sys.stderr)
