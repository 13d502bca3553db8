"""The retrieval service: `agentic-r serve`."""
