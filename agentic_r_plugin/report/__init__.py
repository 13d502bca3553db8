"""`agentic-r report`: a run folder as one HTML page and as Markdown."""
