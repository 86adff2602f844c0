"""Systems: one or several networks with sampler, guidance and decoder, which together make the samples of a table row."""
