"""U-ViT as a backbone for backbone-harness."""
