"""`fastencoder scaffold CLASS`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import fail, quiet


def scaffold(
    layer_class: Annotated[str, typer.Argument(metavar="CLASS", help="A layer class: package.module.MyLayer.")],
) -> None:
    """Propose how to register a layer class: which known one it computes like, checked against its own forward.

    The package of CLASS is imported and the class is built from its default config.

    Exit status: 0 a known adapter fits and agrees, 1 none does (what is known of its parts is printed), 2 CLASS was not found.
    """
    quiet()
    from fastencoder import registry
    from fastencoder import scaffold as scaffolding

    if registry.by_class(layer_class) is not None:
        typer.echo(f"{layer_class} is registered already.")
        return
    try:
        layer = scaffolding.build_layer(scaffolding.load_class(layer_class))
    except scaffolding.CannotBuild as error:
        fail(str(error))
    found = scaffolding.proposals(layer)
    typer.echo(scaffolding.describe(layer_class, layer, found))
    if not any(proposal.agrees for proposal in found):
        raise typer.Exit(1)
