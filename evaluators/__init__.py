"""How samples are judged: feature extractors, statistics, metrics with intervals, and the suites that bundle them."""
