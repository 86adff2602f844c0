"""Diffusion Transformers (Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748)."""
