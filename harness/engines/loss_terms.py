"""What the log holds of a training step, by kind of backbone, with its weight in the loss."""

LOSS_TERMS = {
    "denoiser": {"mse": 1.0, "vb": 1.0},
    "upsampler": {"mse": 1.0, "vb": 1.0},
    "classifier": {"cross_entropy": 1.0, "accuracy": 0.0},
}
