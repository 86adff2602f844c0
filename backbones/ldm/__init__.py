"""LDM: the latent-space U-Nets of Rombach et al., conditioned on the class by cross-attention."""
