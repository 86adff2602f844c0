"""The conformance suite of backbones, one for built-in networks and those of packages: `harness check`.

    checks         what a network must do, written once for both frameworks
    torch_network  a torch network, called with numpy arrays
    jax_network    a Flax network, called with numpy arrays
    parity         a torch network against a Flax network of the same backbone

Most checks use a network whose weights have been moved by noise: many networks begin with a last layer of zeros, and what
such a network returns shows nothing.
"""
