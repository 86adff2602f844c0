"""The conformance suite of backbones, one for built-in networks and those of packages: `harness check`.

    suite          all checks of a backbone, and the quick ones before a training
    checks         what a network must do, written once for both frameworks
    network        what the checks need of a network; inputs, and weights moved by noise
    torch_network  a torch network, called with numpy arrays
    jax_network    a Flax network, called with numpy arrays
    parity         a torch network against a Flax network of the same backbone

Most checks use a network whose weights have been moved by noise: many networks begin with a last layer of zeros, and what
such a network returns shows nothing.
"""
