"""The JAX engine: the same experiment as torch's, on one device or over a mesh of them."""
