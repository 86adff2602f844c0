"""The torch engine: training and sampling on one device, or over several processes."""
