"""Find in the corpus the passages that another agent was shown, or that a question's own row holds."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.field_values import Row
from agentic_r_plugin.forms import passage_fields
from agentic_r_plugin.protocol import disarm
from agentic_r_plugin.records import Passage, text_id
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.storage.lookup import HashIndex, key_hash


def context_passage(document: Row) -> Passage:
    """The passage of one of `forms.context_documents`; the id of one without is a hash of title and text.

    Raises:
        RecordError: title or text have another type.
    """
    identifier, contents = passage_fields(document)
    return Passage.from_contents(identifier or text_id(contents), contents)


class PassageFinder:
    """Looks passages up by id and by text; text is compared exactly, but for white space.

    The index of texts is on disk (two hashes per passage) and is built when the first passage is looked up by text.

    Attributes:
        counts: passages found `by_id`, `by_text`, and `not_found`.
    """

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.counts = {"by_id": 0, "by_text": 0, "not_found": 0}
        self._corpus, self._folder = corpus, folder
        self._index: HashIndex | None = None

    def find(self, shown: Passage) -> Passage | None:
        """The corpus's passage, or None if the corpus lacks it.

        An id alone is trusted. If there is also a text, the corpus's must begin with it, and a title alone must be the
        corpus's: another corpus may use the same ids for other passages.
        """
        how, found = "by_id", self._corpus.by_id(shown.id) if shown.id in self._corpus else None
        if found is None or not _agrees(found, shown):
            how, found = "by_text", self._by_text(shown)
        self.counts["not_found" if found is None else how] += 1
        return found

    def close(self) -> None:
        """Delete the index; safe to call twice."""
        if self._index is not None:
            self._index.close()
            self._index = None

    def _by_text(self, shown: Passage) -> Passage | None:
        for text in filter(None, _texts(shown)):
            for row in self._opened().find(key_hash(text)):
                # Different texts can have the same hash.
                if text in _texts(passage := self._corpus[row]):
                    return passage
        return None

    def _opened(self) -> HashIndex:
        if self._index is None:
            self._index = HashIndex(self._folder)
            for row, passage in enumerate(self._corpus):
                for text in set(_texts(passage)):  # equal without a title
                    self._index.add(key_hash(text), row)
            self._index.finish()
        return self._index


def _texts(passage: Passage) -> tuple[str, str]:
    """Title with text, and text alone, as an agent may have been shown them, with white space collapsed."""
    return _words(f"{passage.title} {passage.text}"), _words(passage.text)


def _words(text: str) -> str:
    # The agent saw passages with their tags disarmed (`protocol.disarm`), so both sides are compared in that form.
    return " ".join(disarm(text).split())


def _agrees(passage: Passage, shown: Passage) -> bool:
    """Whether a passage of the corpus begins with the text that was shown, or has the title where no text was."""
    if not shown.text.strip():
        return not shown.title.strip() or _words(passage.title) == _words(shown.title)
    return any(whole.startswith(part) for whole, part in zip(_texts(passage), _texts(shown), strict=True))
