"""`python -m recipes.quickstart.warm_start [--config FILE] [key=value ...] [--resume]`, run in the checkout."""

import sys

from agentic_r_plugin.cli import Command, main

COMMAND = Command(
    "make the small agent from generated worlds", "train:WarmStartConfig", "recipes.quickstart.warm_start"
)

if __name__ == "__main__":
    sys.exit(main(["warm-start", *sys.argv[1:]], {"warm-start": COMMAND}))
