"""Samples of data sets become batches: block reads, caches, substitutes, the loader, the contact sheet."""
