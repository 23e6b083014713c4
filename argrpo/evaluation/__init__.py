"""Measures of a set of images against references: nothing here is ever a reward."""
