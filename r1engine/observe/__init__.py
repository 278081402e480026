"""What a run shows: metrics, progress, summary and report. Imports nothing heavy until it is used."""
