"""The sums that every statistic of a pair is made of: in Triton and in torch."""
