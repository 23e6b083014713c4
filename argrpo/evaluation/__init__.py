"""Measures of a set of images against references, and what they need: features and moments."""
