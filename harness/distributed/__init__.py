"""Several processes at work on one run: who launched them, and what they agree on."""
