"""How a flag is declared, and how a dataclass of flags becomes parameters of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import typer

# Help is printed in these groups. A flag is a field `name: Annotated[type, of_model(help="...")] = default`.
of_model = partial(typer.Option, rich_help_panel="Model")
of_scoring = partial(typer.Option, rich_help_panel="Scoring")
of_input = partial(typer.Option, rich_help_panel="Input")
of_output = partial(typer.Option, rich_help_panel="Output")
of_cluster = partial(typer.Option, rich_help_panel="Cluster")
of_comparison = partial(typer.Option, rich_help_panel="Compare")


class Flags(Protocol):
    """A dataclass of flags."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self) -> None:
        """Raise EndoRewardError naming the flag whose value cannot work."""


F = TypeVar("F", bound=Flags)


def takes(flags: type[F]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with a parameter `flags`: on the command line it is the dataclass's fields."""
    hints = get_type_hints(flags, include_extras=True)
    parameters = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=f.default)
        for f in fields(flags)
        if hasattr(hints[f.name], "__metadata__")  # Annotated by its Option
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(command, include_extras=True)
        before = [
            p.replace(annotation=own[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.name not in ("flags", "context")
        ]
        asks = "context" in inspect.signature(command).parameters

        def run(context: typer.Context, **values: Any) -> None:
            source = context.get_parameter_source("model")
            by_default = source is not None and source.name == "DEFAULT"
            found = {"model_by_default": by_default, **context.meta}
            unsaid = {f.name: found[f.name] for f in fields(flags) if f.name in found}
            given = flags(**{p.name: values.pop(p.name) for p in parameters}, **unsaid)
            given.check()
            command(**values, **({"context": context} if asks else {}), flags=given)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        taken = [context, *parameters, *before]
        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in taken}
        return run

    return decorate
