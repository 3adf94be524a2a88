"""Changes to a finished data set: select, reshard, remove, repair."""
