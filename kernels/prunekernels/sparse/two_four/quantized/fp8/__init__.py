"""Products of `2:4-fp8` weights with activations that are rounded to e4m3 as well."""
