"""Losses, batch-norm necks and memories of methods that learn identities or pseudo-identities."""
