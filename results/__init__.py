"""What was measured: the record schema, the store, the paper's numbers (`published/`) and kept ones (`measured/`).

Needs only the standard library.
"""
