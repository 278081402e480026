"""Steps of a completion: where they end, what they are worth, and searches over them."""
