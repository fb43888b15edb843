"""Registers `optimum-cli export edgeq` in optimum's own command registry; imports nothing heavy at the top."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class EdgeqExport(BaseOptimumCLICommand):  # type: ignore[misc]
    """The same build as `edgeq build`, from the tool that people of this ecosystem already have."""

    COMMAND = CommandInfo(name="edgeq", help="Quantize, build and check a small Qwen checkpoint for an edge device.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the command's words."""
        parser.add_argument("-m", "--model", required=True, help="Folder, hub id, catalogue name or bundled demo.")
        parser.add_argument("-t", "--target", required=True, help="Device: edgeq targets list.")
        parser.add_argument("--recipe", default="auto", help="For example w4g32-e8-rtn; auto: the target's best.")
        parser.add_argument("output", metavar="OUT", help="Folder of the bundle.")

    def run(self) -> None:
        """Build through edgeq's own command line, so that messages and exit codes are the same."""
        from edgeq.cli import main

        words: list[Any] = ["build", self.args.model, "--target", self.args.target, "--recipe", self.args.recipe]
        sys.exit(main([*words, "-o", self.args.output]))


REGISTER_COMMANDS = [(EdgeqExport, ExportCommand)]
