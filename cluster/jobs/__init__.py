"""Pre-training, sharding and evaluation as work of a cluster."""
