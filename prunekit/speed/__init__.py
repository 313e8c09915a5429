"""How fast a model is: decoding, timing, and the variants that are compared."""
