"""2:4 weights whose kept values take 8 or 4 bits, with float32 scales."""
