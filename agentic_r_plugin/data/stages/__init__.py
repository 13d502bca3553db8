"""The shell around a data stage: files, resume, executors, cost."""
