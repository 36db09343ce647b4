"""`snscc pack`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from snscc_ray.cli.options import fail, out, say
from snscc_ray.config.errors import UserError
from snscc_ray.texts import counted


def pack_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of images, nested or not")],
    shards: Annotated[str, typer.Argument(metavar="OUT", help="folder for the shards")],
    shard_mb: Annotated[
        int, typer.Option(min=1, max=2000, help="approximate size of a shard")
    ] = 64,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=4,
            max=1024,
            help="resize larger images to squares of this side, and encode them again",
        ),
    ] = None,
    folders_are_labels: Annotated[
        bool, typer.Option("--folders-are-labels", help="sub-folder names become labels")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, help="processes; 0: one per core")] = 0,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="leave out unreadable images and list them")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace earlier shards in OUT")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="only check the finished shards in OUT")
    ] = False,
) -> None:
    """Write a folder of images as Parquet shards; the same command resumes.

    Examples:

        snscc pack ~/photos shards/photos

        snscc pack imagenet/train shards/imagenet --image-size 256 --folders-are-labels

        snscc pack ~/photos shards/photos --verify
    """
    # Imported here so that --help need not wait seconds for torch.
    from snscc_ray.config.paths import as_path, expanded
    from snscc_ray.data import pack

    place = as_path(shards)
    if verify and overwrite:
        raise UserError("--verify checks shards and --overwrite replaces them; give one of them")
    if verify:
        found = pack.verify(place, jobs, out)
    else:
        options = pack.Options(shard_mb, image_size, folders_are_labels)
        try:
            request = pack.Request(expanded(folder), place, options, jobs, skip_corrupt, overwrite)
            found = pack.pack(request, out)
        except KeyboardInterrupt:
            fail("stopped; run the same command again to continue: finished shards are kept", 130)
    rate = f", {found.packed / found.seconds:,.0f} images/s" if found.packed else ""
    lines = [
        f"{'OK: ' * verify}{counted(found.shards, 'shard')}, {counted(found.rows, 'row')}, "
        f"{found.bytes / 1e6:,.1f} MB, {len(found.skipped):,} skipped{rate}"
    ]
    if found.first_frames:
        cut = counted(found.first_frames, "image")
        lines.append(f"Only the first frame or page is kept of {cut}")
    if found.skipped:
        lines.append(f"Left out: {place / pack.SKIPPED}")
    if not verify:
        lines.append(f"Next: snscc fit {shlex.quote(str(place))}")
    for line in lines:
        say(line)
