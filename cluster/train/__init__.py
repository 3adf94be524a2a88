"""A run under Ray Train: driver, workers, how many there are, how they meet, which stand by."""
