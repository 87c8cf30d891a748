"""The benchmark suite: contestants, cases, and what runs and judges them.

Runs also where only NumPy is installed, on Python 3.10: a contestant's own environment need not
have this library.
"""
