"""Common parts of the U-Nets of ADM and LDM: the layout of their blocks, their compute, their torch and Flax layers."""
