"""The speed of models: decoding, timing, and the variants that are compared."""
