"""The commands, by what they do: make data sets, look into them, change them."""
