"""Declare flags, and turn a dataclass of flags into parameters of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import typer

# The groups of --help. A flag is a field `name: Annotated[type, of_model(help="...")] = default`.
of_model = partial(typer.Option, rich_help_panel="Model")
of_scoring = partial(typer.Option, rich_help_panel="Scoring")
of_input = partial(typer.Option, rich_help_panel="Input")
of_output = partial(typer.Option, rich_help_panel="Output")
of_cluster = partial(typer.Option, rich_help_panel="Cluster")
of_head = partial(typer.Option, rich_help_panel="Head")
of_server = partial(typer.Option, rich_help_panel="Server")
of_limits = partial(typer.Option, rich_help_panel="Limits")
of_comparison = partial(typer.Option, rich_help_panel="Compare")


class Flags(Protocol):
    """A dataclass of flags."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self) -> None:
        """Raise EndoRewardError that names the flag whose value cannot work."""


F = TypeVar("F", bound=Flags)


def takes(flags: type[F]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a command with a parameter `flags`. The command line gets the dataclass's fields."""
    hints = get_type_hints(flags, include_extras=True)
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=f.default)
        for f in fields(flags)
        if hasattr(hints[f.name], "__metadata__")  # Annotated with its Option
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(command, include_extras=True)
        before = [
            p.replace(annotation=own[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name not in ("flags", "context")
        ]
        takes_context = "context" in inspect.signature(command).parameters

        def run(context: typer.Context, **values: Any) -> None:
            source = context.get_parameter_source("model")
            by_default = source is not None and source.name == "DEFAULT"
            found = {"model_by_default": by_default, **context.meta}
            not_flags = {f.name: found[f.name] for f in fields(flags) if f.name in found}
            given = flags(**{p.name: values.pop(p.name) for p in parameters}, **not_flags)
            given.check()
            command(**values, **({"context": context} if takes_context else {}), flags=given)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        taken = [context, *parameters, *before]
        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in taken}
        return run

    return decorate
