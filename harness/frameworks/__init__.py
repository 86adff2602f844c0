"""Which frameworks are installed, and the settings that each needs."""
