"""The report of a run: its record, read from the run folder, and the HTML page.

May import everything below the public door except commands.
"""
