"""Packed sparse weights and the matrix multiplications that read them."""
