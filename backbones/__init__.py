"""The networks that are compared, one folder a family: a framework-free spec, and one file per framework."""
