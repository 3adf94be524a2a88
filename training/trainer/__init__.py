"""A run: the loop, one rank from start to end, stops, steps that are not finite, milestones."""
