"""The records of files, tables and sequences."""
