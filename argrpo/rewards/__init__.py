"""Judges: what turns images into scores. See protocols.py for the contract."""
