"""A ConvMixer denoiser: an example of a plug-in for backbone-harness."""
