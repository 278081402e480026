"""What the demonstrations make on the spot."""
