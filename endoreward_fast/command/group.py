"""How commands run: errors in one line, `help COMMAND`, and commands that run in one process."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import EndoRewardError
from .run.jobs import ANSWERS
from .run.monitor import one_line
from .run.ranks import Rank

BAD_INPUT = 2  # exit code


class Group(TyperGroup):
    """Print an EndoRewardError in one line and exit with code 2. Other exceptions are bugs: they keep a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Treat `help COMMAND` as `COMMAND --help`."""
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Keep the arguments as given in the context's `obj`."""
        given = tuple(args)
        ctx = super().make_context(info_name, args, parent, **extra)
        ctx.obj = given
        return ctx

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EndoRewardError as error:
            rank = os.environ.get("RANK", "0")
            speaker = "" if rank == "0" else f"rank {rank}: "
            print(f"endoreward: {speaker}{one_line(str(error))}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None


class OneProcess(TyperCommand):
    """A command that runs in one process."""

    def invoke(self, ctx: Any) -> Any:
        rank = Rank.from_environment()
        if rank.alone:
            return super().invoke(ctx)
        if not rank.first:
            raise typer.Exit  # after another exit code, the launcher might end rank 0 before it has printed why
        raise EndoRewardError(
            f"{ctx.info_name} runs in one process: start it without a launcher (only {' and '.join(ANSWERS)} run in "
            "several)"
        )
