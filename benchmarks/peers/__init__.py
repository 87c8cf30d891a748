"""Contestants, a module for each package, set up as its documentation advises for speed."""
