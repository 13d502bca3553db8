"""FlashRAG's `run_exp.py` for search agents: the same four flags, our pipeline.

    python recipes/evaluation/run_exp.py --method_name agentic-r --split dev --dataset_name hotpotqa --gpu_id 0 \
        agent.model=AGENT search.index=index/agentic_r

Everything else is in `flashrag.yaml` next to this file, or in another `--config`; `key=value` sets what is below
`agentic_r` there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrag.config import Config
from omegaconf import OmegaConf

from agentic_r_plugin.cli import reported
from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.evaluation.settings import KEY, AgenticRSettings

METHODS: dict[str, dict[str, Any]] = {
    "agentic-r": {},
    "search-r1": {"protocol": "search_r1_released"},
    "r1-searcher": {"protocol": "r1_searcher", "limits": {"max_malformed": 0}},
    "simpledeepsearcher": {"protocol": "simple_deep_searcher", "limits": {"max_malformed": 0, "max_searches": 10}},
}
"""FlashRAG's name of a method -> its settings; `agentic-r` is what the agent's own folder says."""


def compose(options: argparse.Namespace) -> Config:
    """FlashRAG's configuration: the file, then the method, then flags and overrides.

    Raises:
        ConfigError: no such file, an unknown key or a wrong value below `agentic_r`.
    """
    if not Path(options.config).is_file():
        raise ConfigError(f"{options.config}: no such file")
    # Read for our section only, so this Config must neither make a folder nor set the GPU.
    in_file = Config(options.config, {"disable_save": True, "gpu_id": None})[KEY] or {}
    chosen = OmegaConf.merge(in_file, METHODS[options.method_name])
    settings = load_config(AgenticRSettings, values=OmegaConf.to_container(chosen), overrides=options.overrides)
    given = {"dataset_name": options.dataset_name, "save_note": options.method_name, KEY: to_dict(settings)}
    flags = {"split": [options.split] if options.split else None, "gpu_id": options.gpu_id}
    return Config(options.config, given | {name: value for name, value in flags.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the split, print the metrics."""
    parser = argparse.ArgumentParser(description="Run a search agent in FlashRAG.")
    parser.add_argument("--method_name", choices=METHODS, default="agentic-r")
    parser.add_argument("--split", help="train, dev or test; default: as the configuration says")
    parser.add_argument("--dataset_name", required=True, help="folder below data_dir")
    parser.add_argument("--gpu_id", help="CUDA_VISIBLE_DEVICES, such as 0 or 0,1; default: as the configuration says")
    parser.add_argument("--config", default=str(Path(__file__).with_name("flashrag.yaml")), help="FlashRAG's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="below agentic_r")
    options = parser.parse_intermixed_args(arguments)
    config = compose(options)
    pipeline = AgenticSearchPipeline(config)
    try:
        pipeline.run(load_split(config, config["split"][0]))
    finally:
        pipeline.close()


if __name__ == "__main__":
    with reported("run_exp.py"):
        main()
