"""Image files: which there are, how they are read, what is refused, and what is done to them before the encoder."""
