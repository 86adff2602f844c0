"""The optional frameworks: which are installed, and settings and repairs that they need."""
