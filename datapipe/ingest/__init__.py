"""Crops of sources become shards: list, scan, screen, plan, repartition, write."""
