"""Weights of any sparsity: one bit per weight, and the values that are not zero."""
