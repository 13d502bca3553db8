"""Run-time changes to verl 0.9.1 needed on every machine; `patches/` holds the same changes as patch files."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from agentic_r_plugin.agent import packed_attention
from agentic_r_plugin.upstream import Hook, apply

_log = logging.getLogger(__name__)

VerlHook = partial(Hook, distribution="verl", versions=("0.9.1",))
"""A hook for the pinned release of verl."""


def configured_attention(owner: Any, attribute: str, original: Any) -> None:
    """Load the critic with the attention named in its configuration; verl always requests flash attention.

    If loading fails, verl's own function is called: it raises its own error, or falls back to TRL's value head, still
    with flash attention.
    """

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        try:
            return AutoModelForTokenClassification.from_pretrained(
                pretrained_model_name_or_path=local_path,
                dtype=torch_dtype,
                config=model_config,
                attn_implementation=model_config._attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:
            _log.warning("the critic %s could not be loaded: %s", local_path, error)
            return original(local_path, torch_dtype, model_config, trust_remote_code)

    setattr(owner, attribute, load_valuehead_model)


HOOKS = (
    VerlHook(
        name="configured_attention",
        symbol="verl.utils.model:load_valuehead_model",
        patch="patches/verl-0.9.1-valuehead-attention.patch",
        install=configured_attention,
    ),
)


def install() -> list[str]:
    """Apply the hooks and register our attention with transformers; return the names of the hooks applied now.

    Raises:
        UpstreamError: the version of verl is not supported, or a symbol has moved.
    """
    packed_attention.register()
    return apply(HOOKS)
