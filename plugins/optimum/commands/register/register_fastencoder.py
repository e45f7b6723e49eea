"""`optimum-cli fastencoder ...`: the `fastencoder` command, where users of optimum look for it.

optimum imports every file of the namespace `optimum.commands.register` and adds the commands in its `REGISTER_COMMANDS`. So
nothing is imported here but optimum's own base class; the command itself is imported when it is run. The folders above this
file belong to optimum and to other packages as well, and may not have an `__init__.py`.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class FastencoderCommand(BaseOptimumCLICommand):
    """Hands its arguments on as they are, `--help` among them."""

    COMMAND = CommandInfo(
        name="fastencoder",
        help="Encoder models on packed tokens and fused kernels: explain, verify, bench, compile, ...",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # so that no argument looks like an option of this parser
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from fastencoder.cli import app

        app(args=self.args.arguments, prog_name="optimum-cli fastencoder")


REGISTER_COMMANDS = [FastencoderCommand]
