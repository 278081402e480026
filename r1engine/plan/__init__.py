"""`r1engine plan`: memory, traffic and time of a run on paper, before a GPU is rented. Needs no weights and no GPU."""
