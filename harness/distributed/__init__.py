"""Several processes that work on one run: how they were launched, and what they agree on."""
