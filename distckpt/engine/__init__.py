"""The way of a state from live tensors into the memory that files are written from."""
