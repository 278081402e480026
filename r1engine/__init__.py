"""r1engine: reinforcement-learning post-training as in DeepSeek-R1, from a laptop to a cluster."""

__version__ = "0.1.0"
