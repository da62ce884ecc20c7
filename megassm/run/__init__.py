"""The run directory and the files in it, without an engine. Imports no torch."""
