"""Noise schedules, respacing, sampler plans and objectives: numpy in float64, no framework.

Everything that depends on the step is computed once here; a framework applies it with plain arithmetic.
"""
