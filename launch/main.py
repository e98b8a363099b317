"""The command `polygraft`: which commands there are, and how their failures become exit statuses.

Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 no service is running, 4 there is no such thing.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from polygraft.cluster.client import ApiFailure
from polygraft.cluster.service import ServiceNotRunning
from polygraft.cluster.settings import BadSettings
from polygraft.cluster.store.base import StoreUnavailable, WriteRefused
from polygraft.launch.commands import (
    backbones,
    bitdelta,
    chat,
    classify,
    demo,
    doctor,
    drain,
    grafts,
    jobs,
    keys,
    methods,
    search,
    service,
    soups,
    story,
    top,
)
from polygraft.launch.commands.common import Flags
from polygraft.launch.output import Failure, Status, print_error


class Commands(TyperGroup):
    """Every foreseen failure becomes one line on stderr and an exit status."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except ServiceNotRunning as error:
            raise _exit(str(error), Status.NOT_RUNNING) from None
        except WriteRefused as error:
            raise _exit(f"{error}; make room on its disk", Status.FAILED) from None
        except StoreUnavailable as error:
            raise _exit(f"{error}; is the service up? polygraft doctor says more", Status.NOT_RUNNING) from None
        except BadSettings as error:
            raise _exit(str(error), Status.USAGE) from None
        except ApiFailure as error:
            raise _exit(str(error), Status.NOT_FOUND if error.status == 404 else Status.FAILED) from None
        except Failure as error:
            raise _exit(str(error), error.status) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has gone
                raise
            raise _exit(
                f"{error.filename}: {error.strerror}" if error.filename else str(error), Status.FAILED
            ) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train, search and serve many parameter-efficient fine-tunes of one frozen backbone.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 no service is running, 4 no such thing.",
)


@app.callback()
def root(
    context: typer.Context,
    home: Annotated[
        Path | None, typer.Option(help="Folder of the service: state, data, key. [env: POLYGRAFT_HOME; ~/.polygraft]")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A service elsewhere, instead of the one under --home.")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="POLYGRAFT_API_KEY", help="API key, instead of the local tenant's.")
    ] = None,
) -> None:
    context.obj = Flags(home=home, url=url, key=key)


service.register(app)
jobs.register(app)
chat.register(app)
classify.register(app)
backbones.register(app)
grafts.register(app)
methods.register(app)
soups.register()
bitdelta.register()
search.register(app)
story.register(app)
top.register(app)
keys.register(app)
drain.register(app)
demo.register(app)
doctor.register(app)


def main() -> None:
    app()


def _exit(message: str, status: Status) -> typer.Exit:
    print_error(message)
    return typer.Exit(int(status))
