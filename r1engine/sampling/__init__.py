"""Answers from a model: drawn and graded at once, kept in files that are whole or absent."""
