"""The checks of `minitune doctor`: a machine and a model, each finding a row of a table.

May import everything below commands/.
"""
