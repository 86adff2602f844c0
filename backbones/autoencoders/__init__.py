<<<<<<< HEAD
"""Autoencoders between images and latents, which decode the samples of latent backbones; they are not backbones.
=======
"""Autoencoders that turn images into latents and back: no backbones, but what latent backbones are decoded by.
>>>>>>> refs/heads/data

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Sec. 3.1 and
appendix G.
"""
