"""Engines: what trains and samples a network, one folder for each framework (see `harness.engines.interfaces`)."""
