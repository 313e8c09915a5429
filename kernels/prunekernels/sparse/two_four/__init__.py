"""2:4 weights: two of every four values kept, for sparse tensor cores."""
