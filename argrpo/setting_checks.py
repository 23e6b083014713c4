"""Checks that several settings share."""


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a whole number below the least one.

    Raises:
        ValueError: it is below; the setting is named.
    """
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
