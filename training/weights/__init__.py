"""Weights in and out: exports, safe reading, published layouts, where a run starts from."""

from training.weights.export import load_backbone

__all__ = ["load_backbone"]
