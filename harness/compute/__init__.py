"""Compute accounting: what a forward pass costs, in the convention that the DiT paper's figures follow.

1 multiply-add = 1 flop, of every matrix product, convolution and attention; plus 1 flop per element of the
normalisations: of a DiT block the two layer norms around self-attention and MLP, of a U-Net or GAN every one. The layer norm
before cross-attention and the final layer norm of a DiT are not counted. Biases, softmax, activations, modulation,
residuals, look-ups and resampling are free.

The paper (arXiv:2212.09748) states multiply-adds; the term for the normalisations is fitted: it is what reproduces
its Tables 1, 4 and 6 to the printed digit, DiT-B/4 excepted (5.57 by the convention, 5.56 in print). The pure
multiply-adds are therefore always given beside it.
"""

CONVENTION = (
    "1 multiply-add = 1 flop, plus 1 flop per element of counted normalisations (in a DiT block the two around "
    "self-attention and MLP; in a U-Net, GAN or auto-encoder all); one forward pass on one image, no guidance, no decoder. "
    "Fitted to Tables 1, 4 and 6 of arXiv:2212.09748; Gmacs are the multiply-adds alone."
)
"""The convention in the words that are printed with the numbers."""

TRAINING_FACTOR = 3
"""Forward passes that a training step costs: a backward pass counts as two (DiT, sec. 5 and Figure 9)."""
