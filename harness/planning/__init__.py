"""What is asked for, whether it can be run, and what it costs, before anything expensive begins."""
