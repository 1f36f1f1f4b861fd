"""Benchmarks: input, contestants, measurements. Nothing of the project imports this package but `adtally bench`."""
