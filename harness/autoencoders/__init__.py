"""Autoencoders of latent diffusion: their files, loading, encoding, decoding and compute."""
