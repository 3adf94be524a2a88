"""Labelled data sets: recognised, read, checked, turned into shards for fine-tuning."""
