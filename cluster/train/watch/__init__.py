"""What is watched of a run under Ray Train: starts, signs of life, hangs; and whether it starts again."""
