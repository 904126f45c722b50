"""Early exits: sequences that leave after a layer or pass over layers, and words that are computed no further."""
