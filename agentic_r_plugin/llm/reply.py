"""A reply to a message: its text, whether it was cut, and the end of the model's thoughts in it."""

from __future__ import annotations

import re


class Reply(str):
    """Text of a reply; a subclass of `str`, so that code written for strings also accepts it.

    Args:
        text: the model's output.
        cut: whether the text is incomplete, such as at `max_tokens`.
    """

    cut: bool

    def __new__(cls, text: str, *, cut: bool = False) -> Reply:
        reply = super().__new__(cls, text)
        reply.cut = cut
        return reply


_TAG = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|antthinking)"
_ENDS = re.compile(
    rf"<\s*/\s*{_TAG}\s*>"  # DeepSeek-R1, Qwen3, Seed-OSS and most others
    r"|\[/THINK(?:ING)?\]"  # Magistral
    r"|◁/think▷"  # Kimi-VL
    r"|<\|END_THINKING\|>|<\|end_of_thought\|>"  # Command A, Sky-T1
    r"|<\|channel\|>final<\|message\|>|\Aanalysis(?s:.)*assistantfinal"  # gpt-oss, with and without its special tokens
    r"|<channel\|>",  # Gemma
    re.IGNORECASE,
)
# `analysis` before a capital letter: gpt-oss without its special tokens (`analysisThe user asks ...`).
_BEGINS = re.compile(
    rf"<\s*{_TAG}\s*>|\[THINK(?:ING)?\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>"
    r"|<\|channel\|>(?:analysis|commentary)|<\|channel>|\Aanalysis(?-i:(?=[A-Z]))",
    re.IGNORECASE,
)


def after_thoughts(text: str) -> tuple[str, bool]:
    """Return the text after the last end of a thought, and whether a thought is still open at the end of the text.

    The opening tag may be missing, because many chat templates write it into the prompt.

    >>> after_thoughts("Perhaps [50]? No.</think>[90]"), after_thoughts("<think>Perhaps [50]")
    (('[90]', False), ('<think>Perhaps [50]', True))
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return rest, _BEGINS.search(rest) is not None


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with the beginning of a thought, as the chat templates of some thinking models write it.

    >>> opens_thought("assistant\\n<think>\\n"), opens_thought("assistant\\n<think>\\n\\n</think>\\n\\n")
    (True, False)
    """
    begins = [match.end() for match in _BEGINS.finditer(prompt)]
    return bool(begins) and not prompt[begins[-1] :].strip()


def thought_end(prompt: str) -> str:
    """What ends the thought that a prompt ends with, as the templates write one that stays empty; else nothing.

    >>> thought_end("assistant\\n<think>\\n"), thought_end("assistant\\n")
    ('\\n</think>\\n\\n', '')
    """
    if not opens_thought(prompt):
        return ""
    mark = [match[0] for match in _BEGINS.finditer(prompt)][-1]
    if mark[0] in "<[◁" and not mark.startswith("<|"):
        return f"\n{mark[0]}/{mark[1:]}\n\n"
    return {"<|START_THINKING|>": "<|END_THINKING|>", "<|begin_of_thought|>": "<|end_of_thought|>"}.get(mark, "")
