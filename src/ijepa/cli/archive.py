"""`ijepa archive`: a run as others receive it."""

from pathlib import Path

import click

from ijepa.cli.options import debug_option, telling
from ijepa.utils.errors import Refused


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Check the archive RUN instead of writing one.")
@click.option("--unfinished", is_flag=True, help="Also a run that has not come to its end.")
@click.option("--licence", default="apache-2.0", show_default=True, help="Of the weights, as the hub names it.")
@click.option("--dataset", help="What the card calls the data; else their path's last part.")
@click.option("--country", default="World", show_default=True, help="Whose electricity the run drew.")
@click.option("--watts", type=click.FloatRange(min=0, min_open=True), help="Power of a device, where it is unknown.")
@debug_option
def archive(
    run: Path,
    out: Path | None,
    verify: bool,
    unfinished: bool,
    licence: str,
    dataset: str | None,
    country: str,
    watts: float | None,
) -> None:
    """Write the release of RUN to OUT: weights, recipe, curves, evaluations, model card, checksums."""
    from ijepa.planning.hardware import find_country
    from ijepa.release.archive import verify_archive, write_archive
    from ijepa.release.model_card import About

    if verify:
        if out is not None:
            raise Refused("--verify", "takes one folder", "write `ijepa archive --verify FOLDER`")
        with telling() as tell:
            count = verify_archive(run, tell)
        click.echo(f"{run}: whole, {count} files")
        return
    if out is None:
        raise Refused("OUT", "is missing", "write `ijepa archive RUN OUT`")
    find_country(country)
    about = About(licence=licence, country=country, watts=watts, dataset=dataset)
    with telling() as tell:
        write_archive(run, out, about, unfinished=unfinished, progress=tell)
    click.echo(f"archive: {out}")
