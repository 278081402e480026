"""The paper's evaluation protocol."""
