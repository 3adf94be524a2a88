"""Rendered pedestrians for the demo, tests and benches."""
