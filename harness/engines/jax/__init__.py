"""The JAX engine: the same experiments as torch's, on one device or over a mesh of devices."""
