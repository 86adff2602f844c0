"""What the U-Nets of ADM and LDM share: the layout of their blocks, their compute, their torch layers."""
