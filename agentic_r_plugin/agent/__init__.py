"""Agent training: Agentic-R in verl (agent loop, reward, metrics, launch) and what verl needs on a CPU."""
