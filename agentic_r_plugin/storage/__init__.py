"""Outputs on disk: who owns one, what it is made from, work that survives a kill, records by key, fingerprints."""
