"""Importance matrices: collected, read from files, and given to the quantisers."""
