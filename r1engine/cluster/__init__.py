"""`r1engine doctor --cluster`: what the ranks of a later run have and reach together, before an expensive start."""
