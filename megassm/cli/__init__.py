"""The command line: parsers and tables, progress. Imports no torch."""
