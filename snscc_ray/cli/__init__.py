"""The command line: parse, call, print. One file per command."""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import typer

from snscc_ray.cli.about import doctor, list_recipes
from snscc_ray.cli.answers.duplicates import duplicates
from snscc_ray.cli.answers.export import export
from snscc_ray.cli.answers.name import name
from snscc_ray.cli.answers.predict import predict
from snscc_ray.cli.answers.report import report
from snscc_ray.cli.answers.similar import similar
from snscc_ray.cli.answers.sort import sort
from snscc_ray.cli.compare import compare
from snscc_ray.cli.fit import fit
from snscc_ray.cli.options import fail
from snscc_ray.cli.pack import pack_folder
from snscc_ray.cli.run import run
from snscc_ray.cli.sweep import sweep
from snscc_ray.config.errors import TrainingError, UserError
from snscc_ray.core.memory import share_one_pool

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Cluster images without labels: Pretrain → Train → Boost.

    Examples:

        snscc fit ~/photos --clusters auto

        snscc run digits

        snscc doctor
    """,
)
app.command("fit")(fit)
app.command("run")(run)
app.command("name")(name)
app.command("predict")(predict)
app.command("similar")(similar)
app.command("export")(export)
app.command("report")(report)
app.command("sort")(sort)
app.command("duplicates")(duplicates)
app.command("sweep")(sweep)
app.command("compare")(compare)
app.command("pack")(pack_folder)
app.command("recipes")(list_recipes)
app.command("doctor")(doctor)

# Older versions of typer raise click's usage error, newer ones that of their bundled click.
_UsageError: Any = typer.BadParameter.__bases__[0]


def console() -> NoReturn:
    """Run `main` as a program, and end the process without the destructors of libraries.

    A command that fails early may end while threads of Arrow are just starting; their pool's
    destructor then aborts the process, with exit status 134 (seen in one of six calls).
    """
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def main() -> None:
    """Run the command line. A usage error is one line on stderr and exit status 2."""
    _fill_closed()
    share_one_pool()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the console cannot show
            stream.reconfigure(errors="backslashreplace")
    if not _has_current_folder():  # torch would abort the process
        fail("the current folder no longer exists; change to one that does", 2)
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        fail(str(error), 2)
    except TrainingError as error:
        fail(str(error), 1)
    except _UsageError as error:
        if not error.format_message():  # no arguments: the help is already printed
            sys.exit(0)
        command = error.ctx.command_path if error.ctx is not None else "snscc"
        fail(f"{error.format_message()} (see {command} --help)", 2)
    except (typer.Abort, KeyboardInterrupt):
        fail("stopped", 130)
    except BrokenPipeError:
        _end_unread()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich and typer exit with status 1
            _end_unread()
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" ({error.filename})" if error.filename else ""
            again = "the same command again (`snscc run` with --resume)"
            fail(f"no space left{where}: free some space and run {again}", 2)
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; check the path and its permissions", 2)


def _end_unread() -> NoReturn:
    """Exit quietly after a broken pipe (`| head`): Python would report it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(128 + signal.SIGPIPE)


def _fill_closed() -> None:
    """Open streams that a shell closed (`>&-`) on devnull, or the next file would replace them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
