"""`snscc export`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from snscc_ray.cli.options import say
from snscc_ray.config.errors import UserError


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder or URL of a finished run")],
    onnx: Annotated[
        str | None, typer.Option("--onnx", metavar="FILE", help="ONNX file to write")
    ] = None,
    torch: Annotated[
        str | None, typer.Option("--torch", metavar="FILE", help="torch.export file to write")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the files")] = False,
) -> None:
    """Export the model of a finished run as one file that works without snscc.

    Input: `images`, uint8 (B, channels, size, size), RGB or grey values from 0 to 255, any B. The
    file includes the normalisation. Outputs: `probabilities` (B, clusters) and `features` (B, D) of
    unit length. Of a run on embeddings, the input is `embeddings`, float32 (B, D), of any length.
    The file is loaded again and compared with the model before it is put in place. Its metadata
    hold the names of the clusters, if they have some (`snscc name`).

    Examples:

        snscc export runs/images --onnx model.onnx

        snscc export runs/images --torch model.pt2 --onnx model.onnx

    In Python:

        onnxruntime.InferenceSession("model.onnx").run(None, {"images": array})

        torch.export.load("model.pt2").module()(tensor)
    """
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.answers.export import Format
    from snscc_ray.answers.export import export as export_run
    from snscc_ray.config.paths import as_path
    from snscc_ray.core.claim import claimed_file
    from snscc_ray.core.storage import check_writable

    given: dict[Format, str | None] = {"torch": torch, "onnx": onnx}
    wanted = {kind: as_path(name) for kind, name in given.items() if name is not None}
    if not wanted:
        raise UserError("give a file to write: --onnx model.onnx, or --torch model.pt2")
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"--onnx and --torch are both {onnx}; give two files")
    for kind, target in wanted.items():
        if target.is_dir():
            raise UserError(f"--{kind} {target} is a folder; give a file")
        check_writable(target)
    with ExitStack() as held:
        for kind, target in wanted.items():
            held.enter_context(claimed_file(target, say))
            if target.exists() and not overwrite:
                raise UserError(f"{target} exists; use --overwrite, or another --{kind}")
        say(f"writing {' and '.join(map(str, wanted.values()))}; this can take half a minute")
        differences = export_run(as_path(run), wanted)
    for kind, found in differences.items():
        say(f"{wanted[kind]}: differs from the model by {found:.1e} at most")
