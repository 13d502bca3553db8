"""`python -m recipes.hotpotqa_cpu.warm_start [--config FILE] [key=value ...] [--resume]`, run in the checkout."""

import sys

from agentic_r_plugin.cli import Command, main

COMMAND = Command(
    "teach a Hugging Face model the protocol on scripted trajectories",
    "train:WarmStartSFTConfig",
    "recipes.hotpotqa_cpu.warm_start",
)

if __name__ == "__main__":
    sys.exit(main(["warm-start", *sys.argv[1:]], {"warm-start": COMMAND}))
