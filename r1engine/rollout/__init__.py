"""Generators: what samples completions from the current policy."""
