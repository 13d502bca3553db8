"""Opens language models and retrievers by name: the typed settings of both backend kinds, shared by all commands.

A backend class (component kinds `llm_backend` and `search_backend`) has a class method `from_spec(spec)`. Settings of
a single backend go into `options`; those that cannot change the result are declared in a dataclass `Options` in the
class (`config.options_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from agentic_r_plugin import components
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, options_of, setting
from agentic_r_plugin.credentials import refuse_secrets
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.base import LLMBackend
from agentic_r_plugin.search.base import SearchBackend
from agentic_r_plugin.store import absolute


@dataclass(frozen=True, kw_only=True)
class LLMSpec:
    """Which language model, and how to reach it."""

    backend: str = setting("registered llm_backend", default="hf")
    model: str = setting("model directory, or the model's name on the server", BY_CONTENTS, default="")
    tokenizer: str = setting("tokenizer directory, if different from the model's", BY_CONTENTS, default="")
    url: str = setting("base URL of an OpenAI-compatible server, with /v1", FREE, default="")
    api_key_env: str = setting("environment variable that holds the key", FREE, default="OPENAI_API_KEY")
    dtype: str = setting("float32, bfloat16, float16, auto (as saved), fast", default="auto")
    device: str = setting("auto: cuda where there is one, else cpu", FREE, default="auto")
    max_batch_tokens: int = setting("rows times longest length of one batch", FREE, default=32_768)
    prefix_cache_tokens: int = setting("tokens whose keys and values are kept", FREE, default=65_536)
    concurrency: int = setting("concurrent requests to a server, per worker", FREE, default=16)
    timeout_s: float = setting("for one request to a server", FREE, default=120.0)
    max_retries: int = setting("further attempts after a request fails in passing", FREE, default=5)
    replicas: int = setting("engines, each a Ray actor with its own accelerators; they share a batch", FREE, default=1)
    options: dict[str, Any] = setting("what only this backend knows", options_of("llm_backend"), default_factory=dict)

    def __post_init__(self) -> None:
        check_least(self, "llm.", replicas=1, concurrency=1, max_retries=0, max_batch_tokens=1)
        _check_timeout(self, "llm")
        if self.replicas > 1 and self.backend == "openai":
            raise ConfigError(
                "llm.replicas: only for local engines; start the server with --data-parallel-size and leave this at 1"
            )
        way_out = "put it into an environment variable and give that variable's name as llm.api_key_env"
        refuse_secrets("llm", {"url": self.url, "api_key_env": self.api_key_env, "options": self.options}, way_out)


@dataclass(frozen=True, kw_only=True)
class RerankSpec:
    """Whether and how search results are reranked, on the search's device."""

    reranker: str = setting("registered reranker", default="cross_encoder")
    model: str = setting("folder or hub name of the reranker; empty: none", BY_CONTENTS, default="")
    depth: int = setting("passages of a search that are reranked", default=50)
    options: dict[str, Any] = setting(
        "options of this reranker", options_of("reranker", "reranker"), default_factory=dict
    )

    def __post_init__(self) -> None:
        check_least(self, "rerank.", depth=1)
        refuse_secrets("rerank", {"model": self.model, "options": self.options}, "keep it in an environment variable")

    @property
    def on(self) -> bool:
        """Whether results are reranked: a model is given, or the reranker is not the default one."""
        return bool(self.model) or self.reranker != "cross_encoder"


@dataclass(frozen=True, kw_only=True)
class SearchSource:
    """What is searched, and with which backend: the settings that `SearchSpec` and the service have in common."""

    backend: str = setting("registered search_backend", default="faiss")
    index: str = setting("index folder built by agentic-r index (faiss, milvus)", BY_CONTENTS, default="")
    corpus: str = setting("corpus file: for bm25, or if it is not the one named in the index", BY_CONTENTS, default="")
    retriever: str = setting("retriever checkpoint, if it is not the one named in the index", BY_CONTENTS, default="")
    device: str = setting("auto: cuda where there is one, else cpu", FREE, default="auto")
    batch_size: int = setting("queries encoded at once", FREE, default=64)
    options: dict[str, Any] = setting(
        "what only this backend knows", options_of("search_backend"), default_factory=dict
    )
    rerank: RerankSpec = setting("rerank the results", LATER, default_factory=RerankSpec)


@dataclass(frozen=True, kw_only=True)
class SearchSpec(SearchSource):
    """Which retriever, and how to reach it."""

    url: str = setting("base URL of a running retrieval service", FREE, default="")
    timeout_s: float = setting("for one request to a service", FREE, default=60.0)
    max_retries: int = setting("further attempts after a request fails in passing", FREE, default=5)

    def __post_init__(self) -> None:
        check_least(self, "search.", batch_size=1, max_retries=0)
        _check_timeout(self, "search")
        way_out = "put it into an environment variable and give that variable's name as search.options.token_env"
        refuse_secrets("search", {"url": self.url, "options": self.options}, way_out)


def _check_timeout(spec: LLMSpec | SearchSpec, where: str) -> None:
    if spec.timeout_s <= 0:
        raise ConfigError(f"{where}.timeout_s: expected a number of seconds above 0, found {spec.timeout_s}")


_PATH_OPTIONS = frozenset({"index", "corpus", "retriever", "model", "folder", "prompt"})
"""Options of backends and scorers that hold the path of a file or a folder."""

Settings = TypeVar("Settings", bound=Any)


def with_absolute_paths(settings: Settings) -> Settings:
    """Make existing paths absolute, for a process in another folder. With `openai`, `model` is a name and unchanged."""
    made: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.metadata.get("decides") == BY_CONTENTS["decides"]:
            made[item.name] = absolute(value)
        elif "options_of" in item.metadata:
            made[item.name] = _absolute_options(value)
        elif is_dataclass(value):
            made[item.name] = with_absolute_paths(value)
    if getattr(settings, "backend", "") == "openai":
        made.pop("model", None)
    return replace(settings, **made)


def _absolute_options(value: Any, name: str = "") -> Any:
    """Options with the paths of existing files and folders made absolute, also within the parts of a hybrid search."""
    if isinstance(value, Mapping):
        return {key: _absolute_options(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute_options(item) for item in value]
    return absolute(value) if name in _PATH_OPTIONS and isinstance(value, str) else value


@contextmanager
def open_llm(spec: LLMSpec) -> Iterator[LLMBackend]:
    """Open the language model that `spec` names; closed at the end of the block.

    Raises:
        UnknownComponentError: no such backend.
        ConfigError: the backend cannot be built from these settings.
    """
    with closing(_replicated(spec) if spec.replicas > 1 else _build("llm_backend", spec.backend, spec)) as backend:
        yield backend


def _replicated(spec: LLMSpec) -> LLMBackend:
    """Replicas of the backend, each with as many GPUs as one model is split over; 0 on the CPU."""
    from agentic_r_plugin.llm.replicas import ReplicatedBackend

    one = replace(with_absolute_paths(spec), replicas=1)
    gpus = 0 if spec.device == "cpu" else int(spec.options.get("tensor_parallel_size", 1))
    return ReplicatedBackend(partial(_build, "llm_backend", spec.backend, one), spec.replicas, gpus)


@contextmanager
def open_search(spec: SearchSpec) -> Iterator[SearchBackend]:
    """Open the retriever that `spec` names; closed at the end of the block.

    Raises:
        UnknownComponentError: no such backend.
        ConfigError: the backend cannot be built from these settings.
        IndexMismatchError: the index does not belong to its corpus or retriever.
    """
    with closing(build_search(spec)) as backend:
        yield backend


def build_search(spec: SearchSpec) -> SearchBackend:
    """Like `open_search`, for a caller that closes the backend itself."""
    spec = resolved(spec)
    backend: SearchBackend = _build("search_backend", spec.backend, spec)
    if not spec.rerank.on:
        return backend
    from agentic_r_plugin.search.rerank import RerankedSearch

    try:
        return RerankedSearch(backend, _build("reranker", spec.rerank.reranker, spec), spec.rerank.depth)
    except BaseException:
        backend.close()
        raise


def resolved(spec: SearchSpec) -> SearchSpec:
    """The settings with the backend `milvus` in place of the default, if the vectors of the index are in Milvus."""
    if spec.backend != "faiss":
        return spec
    from agentic_r_plugin.search.indexing.milvus import in_milvus

    return replace(spec, backend="milvus") if in_milvus(spec.index) else spec


def _build(kind: str, name: str, spec: LLMSpec | SearchSpec) -> Any:
    build = getattr(components.load(kind, name), "from_spec", None)
    if build is None:
        raise ConfigError(f"{kind} {name!r} has no class method from_spec({type(spec).__name__}); it cannot be opened")
    return build(spec)
