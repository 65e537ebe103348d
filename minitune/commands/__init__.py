"""The commands of the entry point `minitune`, each with a `main`, and the commands to type next.

May import: everything.
"""
