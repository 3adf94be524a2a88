"""A run under Ray Train: driver, workers, restarts, hangs, how workers meet."""
