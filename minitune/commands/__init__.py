"""The commands of the entry point `minitune`, each with a `main`.

May import: everything.
"""
