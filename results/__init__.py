"""What was measured: the record schema, the store, the paper's numbers (`published/`) and kept ones (`measured/`).

Importing its modules needs the standard library and numpy; scipy and pandas are imported by the functions that use them.
"""
