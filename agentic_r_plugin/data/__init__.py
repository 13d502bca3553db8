"""Data construction (paper section 3.2): trajectories, candidates, sub-answers, relevance, correctness, groups."""
