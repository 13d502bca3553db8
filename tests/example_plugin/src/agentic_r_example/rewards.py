"""A reward for the agent."""


def brief(outcome, *, words=5):
    """1 if there is an answer of at most `words` words."""
    return float(outcome.answer is not None and len(outcome.answer.split()) <= words)
