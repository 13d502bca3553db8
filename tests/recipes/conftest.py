"""Fixtures of agent training, for the recipes that use them."""

from tests.agent.conftest import agent_dir, question_file, service

__all__ = ["agent_dir", "question_file", "service"]
