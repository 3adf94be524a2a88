"""A server that forks processes of Ray's workers, imports done, and the client that stands where Ray calls Python."""
