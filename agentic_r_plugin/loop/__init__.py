"""The loop of agent and retriever: its settings, the configuration of each phase, costs and forecast."""
