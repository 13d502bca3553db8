"""Inputs and checks of `train-agent` that can fail before anything is written or an accelerator is used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from agentic_r_plugin import compute
from agentic_r_plugin.agent import dataset, verl_config
from agentic_r_plugin.agent.checkpoints import latest_step
from agentic_r_plugin.agent.dataset import SourcedQuestion
from agentic_r_plugin.agent.rewards import RewardSum
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.config import deciding
from agentic_r_plugin.credentials import read_secret
from agentic_r_plugin.errors import ConfigError, SearchError, SearchRefusedError, SearchUnavailableError
from agentic_r_plugin.net import is_loopback
from agentic_r_plugin.protocol import AgentProtocol, Codec, load_protocol
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import read_json


@dataclass(frozen=True, kw_only=True)
class FittingQuestions:
    """The questions of a run whose prompts leave the model room."""

    training: list[SourcedQuestion]
    validation: list[SourcedQuestion] | None
    prompt_tokens: list[int]
    """Tokens of each of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a run folder, read and checked."""

    protocol: AgentProtocol
    questions: FittingQuestions
    verl: Any
    """verl's composed configuration."""
    environment: dict[str, str | None]
    """Environment variables of the training process; None removes a variable."""
    loop: str
    """Content of the agent loop's YAML file."""


def prepare(config: TrainAgentConfig) -> Prepared:
    """Read and check all inputs.

    Raises:
        ConfigError, RecordError: invalid settings, missing or broken files.
        SearchError: the retrieval service does not answer or refuses to search.
    """
    protocol = load_protocol(config.protocol, config.protocol_options)
    RewardSum(config.reward, config.reward_options)  # only a check; the agent loop makes its own
    training, validation = training_questions(config), validation_questions(config)
    check_model(Path(config.model))
    check_service(config, probe=training[0].record.question)
    questions = fitting_questions(config, training, validation)
    composed, environment = compose(
        config, num_questions=len(questions.training), prompt_lengths=questions.prompt_tokens
    )
    return Prepared(
        protocol=protocol,
        questions=questions,
        verl=composed,
        environment=environment,
        loop=verl_config.agent_loop_yaml(config),
    )


def training_questions(config: TrainAgentConfig) -> list[SourcedQuestion]:
    """Read the training questions, at least one batch of them.

    Raises:
        ConfigError, RecordError: the file is missing, broken or too small.
    """
    questions = dataset.read_sourced_questions(config.questions, config.format)
    _require_a_batch(config, questions)
    return questions


def fitting_questions(
    config: TrainAgentConfig, training: list[SourcedQuestion], validation: list[SourcedQuestion] | None
) -> FittingQuestions:
    """Leave out the questions whose prompts do not fit the limits.

    Raises:
        ConfigError: fewer than one batch fit, or no validation question does.
    """
    protocol = load_protocol(config.protocol, config.protocol_options)
    fit = partial(dataset.fitting, protocol=protocol, codec=codec(config.model), limits=config.limits)
    training, lengths = fit(training)
    _require_a_batch(config, training)
    validation, more = fit(validation) if validation is not None else (None, [])
    return FittingQuestions(training=training, validation=validation, prompt_tokens=lengths + more)


def _require_a_batch(config: TrainAgentConfig, questions: Sequence[SourcedQuestion]) -> None:
    if len(questions) < config.batch_size:
        raise ConfigError(
            f"{config.questions}: {len(questions)} questions are fewer than batch_size={config.batch_size}"
        )


def validation_questions(config: TrainAgentConfig) -> list[SourcedQuestion] | None:
    """Read the validation questions, all or a sample; None if no validation is configured.

    The sample does not depend on the run's seed, so runs and iterations are compared on the same questions.
    """
    if config.validation is None:
        return None
    return dataset.draw(
        dataset.read_sourced_questions(config.validation, config.format), config.validation_questions, seed=0
    )


def check_model(folder: Path) -> None:
    """Check that the folder holds a language model.

    Raises:
        ConfigError: it has no config.json, or another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {folder} is not a Hugging Face model folder (it has no config.json)")
    kinds = read_json(folder / "config.json").get("architectures") or []
    if kinds and not any(kind.endswith(("ForCausalLM", "ForConditionalGeneration")) for kind in kinds):
        raise ConfigError(f"model: {folder} is a {', '.join(kinds)}; expected a language model")


def codec(model: str) -> Codec:
    """Load the model's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from agentic_r_plugin.llm.codec import TokenizerCodec

    try:
        return TokenizerCodec(AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: the tokenizer of {model} cannot be loaded: {error}") from error


def check_service(config: TrainAgentConfig, *, probe: str) -> str:
    """Check the retrieval service with one search. Third-party services need not have `/health`.

    Returns:
        Its address, its fingerprint (if it has one), and the number of passages found.

    Raises:
        ConfigError: other machines cannot reach the address, or the token's variable is not set.
        SearchError: it does not answer, or refuses to search.
    """
    token = read_secret(config.retrieval_token_env, "retrieval_token_env")
    client = RetrievalClient(config.retrieval_url, retries=1, timeout_s=config.search_timeout_s, token=token)
    host = httpx.URL(client.url).host
    if config.nodes + config.rollout_nodes > 1 and is_loopback(host):
        raise ConfigError(
            f"retrieval_url={config.retrieval_url}: the other machines cannot reach a loopback address; give one that "
            "all of them reach (serve host=0.0.0.0 token_env=NAME, and retrieval_token_env=NAME here)"
        )
    served = client.url
    try:
        (found,) = client.search([SearchRequest(query=probe, question=probe)], config.topk)
        with suppress(SearchUnavailableError):  # a successful search is enough
            served = client.fingerprint()
    except SearchRefusedError as error:
        if error.status != 401:
            raise
        given = f"the one in {config.retrieval_token_env} is wrong" if token else "none was sent"
        raise SearchError(
            f"{error}: the service requires a token, and {given}; set retrieval_token_env to the variable that holds it"
        ) from error
    finally:
        client.close()
    known_by = "without a fingerprint" if served == client.url else f"fingerprint {served}"
    return f"{client.url}, {known_by}, {len(found)} of {config.topk} passages for {probe[:60]!r}"


def on_cpu(config: TrainAgentConfig) -> bool:
    """Whether to train on the CPU: the setting if given, else True if no accelerator is found."""
    if config.cpu is not None:
        return config.cpu
    from agentic_r_plugin.agent.cpu.detect import cpu_wanted

    return cpu_wanted()


def precision(config: TrainAgentConfig) -> str:
    """Compute type of actor, reference and critic; `auto` if verl's configuration decides."""
    return compute.resolve(config.precision, "cpu") if on_cpu(config) else config.precision


def _check_loggers(config: TrainAgentConfig) -> None:
    """Raise ConfigError for a logger that verl does not know; verl would fail after its models are loaded."""
    from verl.utils.tracking import Tracking

    if unknown := sorted(set(config.loggers) - {*Tracking.supported_backend, "tracking"}):
        raise ConfigError(f"loggers: verl has no {', '.join(unknown)}; it has {', '.join(Tracking.supported_backend)}")


def compose(
    config: TrainAgentConfig, *, num_questions: int, prompt_lengths: Sequence[int]
) -> tuple[Any, dict[str, str | None]]:
    """Compose verl's configuration and the training process's environment for the CPU or for accelerators.

    Raises:
        ConfigError: verl's configuration or the machine does not support the settings.
    """
    from agentic_r_plugin.agent.accelerator import accelerator_overrides

    _check_loggers(config)
    environment: dict[str, str | None] = {"HF_DATASETS_CACHE": str(Path(config.out).resolve() / "data" / "cache")}
    if on_cpu(config):
        from agentic_r_plugin.agent.cpu.overrides import UNSET, cpu_environment, cpu_overrides

        if config.mode != "sync" or config.lora_rank or config.nodes > 1:
            raise ConfigError("on the CPU: expected mode=sync, lora_rank=0 and nodes=1")
        machine = cpu_overrides(
            num_workers=config.devices, train_dtype=config.precision, longest_trajectory=config.limits.max_tokens
        )
        environment |= cpu_environment(num_threads=config.threads)
        environment |= dict.fromkeys(UNSET)
    else:
        from agentic_r_plugin.agent.cpu.detect import SWITCH

        machine = accelerator_overrides(config)
        environment[SWITCH] = "0"
    composed = verl_config.compose(
        config,
        machine=machine,
        num_questions=num_questions,
        prompt_lengths=prompt_lengths,
        fresh=latest_step(Path(config.out)) == 0,
    )
    return composed, environment


def run_output(config: TrainAgentConfig) -> Output:
    """The run folder and everything that determines the agent, apart from the number of steps: a run may be extended.

    Raises:
        ConfigError: a model or a file does not exist.
    """
    # `auto` means different types on different machines, so the resolved type is compared.
    made_from = deciding(config) | {"precision": precision(config)}
    del made_from["steps"]
    for name in ("model", "critic", "questions", "validation"):
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name}: {path} does not exist")
        made_from[name] = path and path_fingerprint(path)
    return Output(out=Path(config.out).resolve(), made_from=made_from, done="done.json", folder=True)
