"""A pixel-space transformer with large patches for backbone-harness."""
