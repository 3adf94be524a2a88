"""JPEG bytes become uint8 views, masks and boxes: pure functions of seed and position."""
