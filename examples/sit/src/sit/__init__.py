"""SiT, with REPA as an option, for backbone-harness."""
