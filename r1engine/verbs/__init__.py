"""What single commands do, each in a file: export a checkpoint, draw samples, look at data."""
