"""`maisi serve`: the HTTP service and its viewer."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import click

from maisi.cli.options import output_option, require_place, running_options, set_up_memory
from maisi.errors import MaisiError

_TOKEN = re.compile(r"[A-Za-z0-9._~-]+")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any that is free.")
@click.option(
    "--model", "models", multiple=True, default=("tiny",), show_default=True, help="Name or folder; repeatable."
)
@click.option("--token", metavar="WORD", help="What callers must know.  [default: none here, drawn elsewhere]")
@click.option("--most-upload", default="2GiB", show_default=True, metavar="AMOUNT", help="Of one file that is sent.")
@running_options
@click.option("--memory", metavar="AMOUNT", help="What the process may use, such as 6GiB.  [default: all that is free]")
@output_option("Folder for jobs and files; one that a service had is gone on with.")
def serve(
    host: str,
    port: int,
    models: Sequence[str],
    token: str | None,
    most_upload: str,
    device: str,
    precision: str,
    memory: str | None,
    output: Path,
) -> None:
    """Serve a page to order volumes from and look at them, and the same as JSON under /api.

    Jobs are made one after the other. The address that is printed opens the page; where the service is heard beyond
    this machine, a token is part of it.
    """
    from maisi.device import parse_memory
    from maisi.io.files import locked, make_folder
    from maisi.weights.registry import carried_models, find_model

    try:
        import uvicorn
        from fastapi import FastAPI as _  # noqa: F401
    except ImportError:
        raise MaisiError(
            "The service needs fastapi and uvicorn; install them with: pip install 'maisi[service]'"
        ) from None
    named: dict[str, str] = {}
    for name in models:
        folder = find_model(name).folder
        called = name if name in carried_models() else folder.resolve().name
        if called in named:
            raise MaisiError(f"Two models are called '{called}'; serve one of them, or rename its folder.")
        named[called] = name if name in carried_models() else str(folder.resolve())
    here = _is_this_machine(host)
    if token is not None and not _TOKEN.fullmatch(token) and not (here and not token):
        raise MaisiError("A token is of letters, digits, '.', '_', '~' and '-', and is not empty; choose another.")
    word = token if token is not None else "" if here else secrets.token_urlsafe(16)
    require_place(device, precision)
    limit, most = set_up_memory(memory), parse_memory(most_upload)
    if output.exists() and not (output / "jobs").is_dir():
        raise MaisiError(f"{output} exists and is no folder of a service; choose another folder or remove it.")
    if not output.parent.is_dir():
        raise MaisiError(f"The folder {output.parent} does not exist; make it first or choose another place.")
    from maisi.generation.maker import Maker
    from maisi.service.app import LOOPBACK, Settings, make_app
    from maisi.service.jobs import Jobs

    make_folder(output / "jobs")
    with locked(output, f"Another service uses {output}; choose another folder."):
        jobs = Jobs(output.resolve() / "jobs", Maker(device, precision, limit))
        hosts = ("*",) if not here else (*LOOPBACK, host)
        app = make_app(Settings(output.resolve(), named, word, hosts, most), jobs)
        server = uvicorn.Server(
            uvicorn.Config(
                app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5
            )
        )
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            why = error.strerror or error
            raise MaisiError(f"Nothing can listen on {host}:{port} ({why}); choose another --port or --host.") from None
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={word}" if word else ""))
        click.echo("Ctrl-C stops it; jobs are gone on with at the next start.", err=True)
        server.run([listener])


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
