"""A relevance scorer: the share of a passage's title words that the query holds."""

from dataclasses import dataclass

from agentic_r_plugin.answers import normalize
from agentic_r_plugin.config import load_config


class TitleWords:
    """Relevance by the words of the title: no model, and no question file."""

    needs_questions = False

    @dataclass(frozen=True)
    class Options:
        """The scorer's options, with their types."""

        full: int = 100

    def __init__(self, full: int) -> None:
        self.full = full

    @classmethod
    def build(cls, options, resources):
        """From `--scorer title_words options.full=90`."""
        return cls(load_config(cls.Options, values=options).full)

    def score(self, tasks):
        """Passage id -> 0..100 for each task."""
        return [{passage.id: self._one(task.query.query, passage.title) for passage in task.passages} for task in tasks]

    def _one(self, query, title):
        words, wanted = set(normalize(query).split()), normalize(title).split()
        return round(self.full * sum(word in words for word in wanted) / len(wanted)) if wanted else 0

    def fingerprint(self):
        """Changes when the scores may change."""
        return f"title_words/{self.full}"
