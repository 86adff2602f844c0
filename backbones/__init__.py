"""The networks that are compared, one folder per family: a spec without a framework, and one file per framework."""
