"""Retrieval with the hidden states of a language model, and measures of what was found."""
