"""Self-supervised pre-training and evaluation for person re-identification. Imports no Ray."""
