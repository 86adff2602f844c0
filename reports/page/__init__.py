"""The page: one self-contained HTML file with the tables, curves, sample grids and the record of every number."""
