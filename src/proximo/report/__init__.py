"""Outputs of a run: its recorder, plots and videos."""
