"""Requests and plans: what to run, whether it can run here, and what it costs, before anything expensive begins."""
