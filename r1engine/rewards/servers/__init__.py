"""What models behind HTTP say: a judge, reward models."""
