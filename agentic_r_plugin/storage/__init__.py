"""Outputs on disk: locks, inputs they were made from, work that survives a kill, records by key, fingerprints."""
