"""Systems: what a table row stands for, as networks with weights, sampler, guidance and decoder."""
