"""What a step takes by arithmetic: memory, operations, communication, time; pure functions of a recipe."""
