"""Agent training: Agentic-R in verl (agent loop, reward, metrics, launch), and support for running verl on a CPU."""
