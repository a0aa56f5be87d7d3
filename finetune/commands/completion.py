"""Print a script that completes commands, options and files in a shell."""

import argparse

from finetune.commands.parsing import COMMANDS, PROGRAM, parser_of
from finetune.runtime.logging import tell

EXAMPLES = """\
finetune completion bash > ~/.local/share/bash-completion/completions/finetune
finetune completion zsh > ~/.zsh/completions/_finetune          a folder of your $fpath
finetune completion fish > ~/.config/fish/completions/finetune.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that the script is for")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import shtab

    whole = argparse.ArgumentParser(prog=PROGRAM)
    commands = whole.add_subparsers()
    for name, what in COMMANDS.items():
        _, parser = parser_of(name)
        commands.add_parser(name, help=what, parents=[parser], add_help=False, conflict_handler="resolve")
    tell(shtab.complete(whole, arguments.shell))
    return 0
