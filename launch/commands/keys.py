"""keys: who may call the API of a local service."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.markup import escape

from polygraft.cluster.api_keys import create_key, list_keys, revoke_key
from polygraft.cluster.model import ApiKey, ApiKeyId, TenantId
from polygraft.launch.commands.common import Json, flags
from polygraft.launch.output import Failure, JsonOut, Status, ago, print_json, print_table, screen

keys = typer.Typer(no_args_is_help=True, help="API keys and the tenants they stand for.")


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


@keys.command()
def create(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(help="Whose key it is; tenants do not see each other's jobs and grafts.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key; its text is shown this once."""
    if not tenant or "/" in tenant or not tenant.isprintable():
        raise Failure(f"tenant: {tenant!r} is not a name; use letters, digits and dashes", Status.USAGE)
    store = flags(context).store()
    key, text = create_key(store, tenant=TenantId(tenant), name=name, at=time.time())
    store.close()
    if as_json:
        print_json({**_shown(key), "key": text})
    else:
        screen.print(
            f"{text}\n[dim]{key.id}, for tenant {escape(tenant)}; it cannot be shown again[/]",
            highlight=False,
            soft_wrap=True,
        )


@keys.command("list")
def list_all(
    context: typer.Context, tenant: Annotated[str | None, typer.Option()] = None, as_json: Json = False
) -> None:
    """List the keys, without their texts."""
    store = flags(context).store()
    found = list_keys(store, TenantId(tenant) if tenant else None)
    store.close()
    if as_json:
        print_json([_shown(key) for key in found])
        return
    print_table(
        ("key", "tenant", "name", "#age", "state"),
        (
            (
                key.id,
                escape(key.tenant),
                escape(key.name),
                ago(key.created_at),
                "[red]revoked[/]" if key.revoked_at else "valid",
            )
            for key in found
        ),
        empty="no keys",
    )


@keys.command()
def revoke(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="As keys list shows it: key-...")],
    as_json: Json = False,
) -> None:
    """Make a key worthless, from the next request on."""
    store = flags(context).store()
    revoked = revoke_key(store, ApiKeyId(key), at=time.time())
    store.close()
    if revoked is None:
        raise Failure(f"key {key!r} does not exist; polygraft keys list shows them", Status.NOT_FOUND)
    if as_json:
        print_json(_shown(revoked))
    else:
        screen.print(f"{key} is revoked.", highlight=False)


def _shown(key: ApiKey) -> dict[str, JsonOut]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }
