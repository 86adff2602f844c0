"""ADM: the pixel-space U-Nets of Dhariwal and Nichol, their upsamplers and their noisy classifiers."""
