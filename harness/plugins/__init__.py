"""Plug-ins: their code, told apart by hash, and those that are a single file. `harness.registry` holds what they bring."""
