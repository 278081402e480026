"""A run's timeline on paper (`r1engine simulate`): unequal completions, staleness, checkpoints, failures."""
