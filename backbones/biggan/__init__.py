"""BigGAN-deep generators (Brock, Donahue and Simonyan, "Large Scale GAN Training", arXiv:1809.11096)."""
