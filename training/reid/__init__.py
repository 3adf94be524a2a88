"""Is the backbone any good at re-identification? Data sets, features, retrieval metrics, pictures, scores."""
