"""Person crops in, a verified WebDataset on any storage out, and a stream of views that never loses a sample."""
