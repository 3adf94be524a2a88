"""What a recipe would need and take, and what is refused, before a run starts."""
