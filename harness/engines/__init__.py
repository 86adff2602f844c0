"""Engines: what trains and samples a network, one folder a framework."""
