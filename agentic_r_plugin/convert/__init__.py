"""`agentic-r convert KIND`: others' questions and trajectories in; training sets and runs out. One module per kind."""
