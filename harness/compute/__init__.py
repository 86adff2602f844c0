"""Compute accounting: the cost of a forward pass, in the convention of the DiT paper's numbers.

1 multiply-add = 1 flop, for every matrix product, convolution and attention; plus 1 flop per element of the counted
normalisations: in a DiT block the two layer norms around self-attention and MLP, in a U-Net, GAN or autoencoder all. The
layer norm before cross-attention and the final layer norm of a DiT are not counted. Biases, softmax, activations,
modulation, residuals, look-ups, sorting and resampling are free.

The paper (arXiv:2212.09748) states multiply-adds. The term for normalisations is fitted: with it, the paper's Tables 1, 4
and 6 are reproduced to the printed digit, except DiT-B/4 (5.57 by the convention, 5.56 in print). So the multiply-adds
alone are always given as well.

A complex multiply-add counts 4 (`harness.compute.fourier`), a fast Fourier transform of n complex numbers 2.5 n log2 n, and
one of n real numbers, or back to them, half of that.

What is summed over an index is a product that counts, however it is written. Tracing sees it where it is written as one
operation (matmul, einsum, a convolution). An element-wise product and a sum behind it, such as the (h * c).sum(-1) of a
selective scan, look like a gate and a mean to it and count nothing; element-wise updates such as a * h + x are free, as
modulation and residuals are. `harness check` warns where such products are more than 1 % of a network: write them as a
product, or declare their compute (`register_flops`).
"""

from harness.compute.custom import register_flops as register_flops

CONVENTION = (
    "1 multiply-add = 1 flop, plus 1 flop per element of counted normalisations (in a DiT block the two around "
    "self-attention and MLP; in a U-Net, GAN or auto-encoder all); one forward pass on one image, no guidance, no decoder. "
    "Fitted to Tables 1, 4 and 6 of arXiv:2212.09748; Gmacs are the multiply-adds alone."
)
"""Text about the convention that is printed with the numbers."""

TRAINING_FACTOR = 3
"""Cost of a training step in forward passes; the backward pass counts as two (DiT, sec. 5 and Figure 9)."""
