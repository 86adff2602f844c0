"""Noise schedules, respacing, sampler plans and objectives: numpy in float64, no framework.

All numbers that depend on the step are computed once here; a framework applies them with plain arithmetic.
"""
