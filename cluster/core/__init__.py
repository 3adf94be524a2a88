"""Joining or starting Ray: addresses, tokens, temporary folders, devices, paths that other machines see."""
