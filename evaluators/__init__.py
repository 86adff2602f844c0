"""Evaluation of samples: feature extractors, statistics, metrics with intervals, and the suites that bundle them."""
