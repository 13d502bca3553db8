"""The training process: `python -m agentic_r_plugin.agent.worker RUN_DIR PARENT_PID`, started only by `launch`.

It reads `RUN_DIR/verl.yaml`, runs verl, and exports the chosen checkpoint. If one of our errors is raised, it is
written to `RUN_DIR/fault.json` for the waiting parent process. The process ends when its parent dies.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agentic_r_plugin.agent.checkpoints import checkpoint_steps, latest_step
from agentic_r_plugin.agent.export import export_model
from agentic_r_plugin.agent.stability import CollapseError, StabilityRule, judge, last_stable
from agentic_r_plugin.child import die_with
from agentic_r_plugin.ray_cluster import our_fault
from agentic_r_plugin.store import StepLog, write_json

FAULT = "fault.json"
STABILITY = "stability.json"


def main(run_dir: Path, parent: int) -> int:
    """Train from the newest checkpoint to the last step, then export; return the exit code."""
    die_with(parent, family=True)
    try:
        train(run_dir)
        return 0
    except BaseException as error:
        traceback.print_exc()
        fault = our_fault(error)
        if fault is not None:
            write_json(run_dir / FAULT, {"type": type(fault).__name__, "message": str(fault)})
        return 1


def train(run_dir: Path) -> None:
    """Run verl if anything is left to do, choose the checkpoint, and write `agent/` and `critic/`."""
    config: Any = OmegaConf.load(run_dir / "verl.yaml")
    stopped = _unfinished(run_dir, config) and not _trained_to_the_end(config)
    checkpoint = run_dir / "checkpoints" / f"global_step_{choose(run_dir, config, stopped=stopped)}"
    if (checkpoint / "critic").is_dir():
        export_model(checkpoint / "critic", run_dir / "critic")
    export_model(checkpoint / "actor", run_dir / "agent")


def _unfinished(run_dir: Path, config: Any) -> bool:
    """Whether steps are left, or the last step's metrics line, which is written after its validation."""
    step = latest_step(run_dir)
    return step < int(config.trainer.total_training_steps) or not StepLog(run_dir / "metrics.jsonl").has(step)


def _trained_to_the_end(config: Any) -> bool:
    """Run verl; return False if the stability rule stopped it."""
    try:
        _run_verl(config)
    except Exception as error:
        # on_collapse=stop ends the run by an error, but its last stable checkpoint is still exported.
        if not isinstance(our_fault(error), CollapseError):
            raise
        print(our_fault(error), flush=True)
        return False
    return True


def choose(run_dir: Path, config: Any, *, stopped: bool) -> int:
    """Choose the step of the checkpoint to export; `stability.json` records the reason, even if there is none.

    Raises:
        TrainingError: there is no stable checkpoint.
    """
    rule = StabilityRule(**OmegaConf.to_container(config.agentic_r.stability))  # type: ignore[arg-type]
    verdict = judge(StepLog(run_dir / "metrics.jsonl").read(), rule)
    reasons = {str(number): list(words) for number, words in verdict.reasons.items()}
    record: dict[str, Any] = {
        "checkpoint": None,
        "stopped": stopped,
        "collapse": verdict.collapse,
        "verdict": verdict.describe(),
    }
    try:
        record["checkpoint"] = last_stable(checkpoint_steps(run_dir / "checkpoints"), verdict)
        return record["checkpoint"]
    finally:
        write_json(run_dir / STABILITY, record | {"unstable": reasons})


def _run_verl(config: Any) -> None:
    import ray
    from verl.trainer.main_ppo import run_ppo

    from agentic_r_plugin.agent.cpu.detect import cpu_wanted
    from agentic_r_plugin.agent.trainer import AgenticTaskRunner, LocalTaskRunner
    from agentic_r_plugin.agent.verl_config import validate
    from agentic_r_plugin.agent.verl_plugin import assert_registered

    assert_registered()
    validate(config)
    try:
        run_ppo(config, task_runner_class=LocalTaskRunner if cpu_wanted() else AgenticTaskRunner)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
