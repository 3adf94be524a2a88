"""Ratios side by side in one run, never timed tests: `python -m tests.bench [views loader order ingest retrieval]`."""
