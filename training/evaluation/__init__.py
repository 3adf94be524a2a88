"""Scores of a run, a checkpoint or an export; fine-tuning as an evaluation."""
