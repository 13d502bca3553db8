"""Record the curves that `test_stability.py` judges: PPO of the tiny agent, once with a learning rate it can bear.

    python tests/agent/curves/record.py [--steps 24]

Writes `healthy.jsonl` and `collapse.jsonl` beside this file: the watched numbers of each step, as `metrics.jsonl` had
them. Takes some minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from agentic_r_plugin.agent.launch import TrainAgentConfig, run
from agentic_r_plugin.agent.metrics import read_metrics
from agentic_r_plugin.agent.stability import WATCHED
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import dump_line, write_records
from tests.agent import tiny_world

LEARNING_RATES = {"healthy": 1e-4, "collapse": 2e-2}
KEPT = ("step", *(name for names in WATCHED.values() for name in names))


def record(name: str, folder: Path, url: str, steps: int) -> None:
    """One training; its watched numbers."""
    config = TrainAgentConfig(
        model=str(folder / "agent"), questions=str(folder / "towns" / "train.jsonl"), retrieval_url=url,
        out=str(folder / name), protocol="compact", limits=tiny_world.LIMITS, topk=1, steps=steps, batch_size=12,
        samples=2, mini_batch_size=12, micro_batch_size=12, actor_lr=LEARNING_RATES[name], actor_warmup=0.0,
        critic_lr=1e-3, critic_warmup=0.0, save_every=steps, cpu=True, threads=1,
    )  # fmt: skip
    try:
        run(config)
    except TrainingError as error:
        print(f"{name}: {error}")
    lines = [line for line in read_metrics(folder / name) if line["step"] > 0]
    kept = [{key: _short(line[key]) for key in KEPT if key in line} for line in lines]
    Path(__file__).with_name(f"{name}.jsonl").write_bytes(b"".join(map(dump_line, kept)))


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Record both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name, tiny_world.serving() as service:
        folder = Path(name)
        tiny_world.write_agent(folder / "agent")
        write_records(folder / "towns" / "train.jsonl", tiny_world.questions())
        for curve in LEARNING_RATES:
            record(curve, folder, service.url, steps)


if __name__ == "__main__":
    main()
