"""Autoencoders between images and latents, which decode the samples of latent backbones; they are not backbones.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Sec. 3.1 and
appendix G.
"""
