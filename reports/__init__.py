"""What people look at: tables, figures and sample grids, as pure functions of records.

Never imports torch, jax or tensorflow, so that a report can be made on a laptop. pandas, matplotlib, seaborn and
Pillow are imported by the functions that draw.
"""
