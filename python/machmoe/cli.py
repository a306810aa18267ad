"""`python -m machmoe train|info|bench|check`."""

import argparse
import importlib
import sys

from .errors import UserError

COMMANDS = {
    "train": ("train.command", "train a MoE language model on text"),
    "bench": ("bench.command", "time machmoe beside its rivals"),
    "check": ("check", "verify the numerics contract on this machine"),
    "info": ("info", "build, backends, devices and versions"),
}


def build_parser(command):
    """Only the chosen command's module is imported: the others may need packages that are not there."""
    parser = argparse.ArgumentParser(prog="python -m machmoe", description="Mixture-of-Experts layers: train, measure, verify.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            implementation = importlib.import_module("." + module, __package__)
            implementation.add_arguments(sub)
            sub.set_defaults(run=implementation.run)
    return parser


def main(argv=None):
    """Exit status: 0 done, 1 a check failed, 2 an error the user can mend, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if word in COMMANDS), None)
    try:
        arguments = build_parser(command).parse_args(argv)
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"machmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"machmoe: {stop or 'interrupted'}", file=sys.stderr)
        return 130
