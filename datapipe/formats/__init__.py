"""What the bytes of a file are: its kind by its first bytes, text in any encoding, images as a viewer shows them."""
