"""Grades answers of mathematics."""
