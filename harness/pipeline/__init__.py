"""The stages of the main job as functions of settings: train, sample, evaluate, report."""
