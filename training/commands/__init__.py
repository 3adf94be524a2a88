"""What `python -m training` does, one file per command or two."""
