"""The queueing model: numbers in, numbers out. NumPy and SciPy only."""
