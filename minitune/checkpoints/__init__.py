"""Model folders, PEFT adapters and merged folders.

Imports from the rest of the package, except from gguf, training, api and commands.
"""
