"""Errors that a user can act on: one sentence, no traceback, exit status 2."""

import importlib


class UserError(Exception):
    """What went wrong and what to do about it, in one sentence."""


def need(module):
    """Imports a package that the commands need and the library does not, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"this command needs {package}, which is not installed: pip install numpy matplotlib tqdm rich") from error
