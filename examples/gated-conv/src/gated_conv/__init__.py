"""A gated-convolution backbone for backbone-harness."""
