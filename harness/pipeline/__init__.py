"""The stages as functions of settings: run, train, sample, evaluate, report, plan and compare."""
