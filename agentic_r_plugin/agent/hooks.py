"""What verl 0.9.1 needs changed at run time on every machine; `patches/` holds the same as patches."""

from __future__ import annotations

import logging
from typing import Any

from agentic_r_plugin.agent import attention
from agentic_r_plugin.upstream import Hook, apply

_log = logging.getLogger(__name__)

VERL = ("0.9.1",)


def configured_attention(owner: Any, attribute: str, original: Any) -> None:
    """Load the critic with the attention its configuration names; verl asks for flash attention whatever it says.

    A model that cannot be loaded so is left to verl's own function: its error, or its value head of TRL, for which it
    still asks for flash attention.
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
    Hook(
        name="configured_attention",
        distribution="verl",
        versions=VERL,
        symbol="verl.utils.model:load_valuehead_model",
        patch="patches/verl-0.9.1-valuehead-attention.patch",
        install=configured_attention,
    ),
)


def install() -> list[str]:
    """Apply the hooks, and make our attention known to transformers; returns the names of the hooks applied now.

    Raises:
        UpstreamError: another verl, or a symbol that has moved.
    """
    attention.register()
    return apply(HOOKS)
