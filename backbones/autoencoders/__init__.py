"""Autoencoders that turn images into latents and back: no backbones, but what latent backbones are decoded by.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Sec. 3.1 and
appendix G.
"""
