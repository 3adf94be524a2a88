"""The network and its losses: modules and pure functions of tensors."""
