"""The report of a series of runs: `python -m cogvit.report`."""
