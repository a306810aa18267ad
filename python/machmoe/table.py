"""Printing of tables."""

from .errors import need


def print_table(table):
    """A table cut to the terminal's width would lose numbers: let the lines wrap instead."""
    console = need("rich.console").Console
    width = console(width=1000).measure(table).maximum
    console(width=max(width, 80)).print(table)
