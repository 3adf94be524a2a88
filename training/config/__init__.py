"""The recipe: its schema, its text, the objects it becomes, and whether a run may go on with it."""
