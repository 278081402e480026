"""Several stages as one program that goes on where it stopped."""
