"""`ijepa archive`: a run as a folder for release."""

from pathlib import Path

import click

from ijepa.cli.options import PATH, debug_option, progress_lines
from ijepa.utils.errors import UserError


@click.command()
@click.argument("run", type=PATH)
@click.argument("out", type=PATH, required=False)
@click.option("--verify", is_flag=True, help="Verify the checksums of the existing archive RUN. Write nothing.")
@click.option("--unfinished", is_flag=True, help="Also accept a run that is not finished.")
@click.option(
    "--license",
    default="apache-2.0",
    help="License of the weights, by its identifier on the Hugging Face Hub.",
)
@click.option("--dataset", help="Name of the data set on the model card. Default: the last part of the data path.")
@click.option("--country", default="World", help="Country whose electricity mix gives the CO2 estimate.")
@click.option(
    "--watts",
    type=click.FloatRange(min=0, min_open=True),
    help="Power per device in watts, with its share of the rest of the machine. Needed for devices unknown to ijepa.",
)
@debug_option
def archive(
    run: Path,
    out: Path | None,
    verify: bool,
    unfinished: bool,
    license: str,
    dataset: str | None,
    country: str,
    watts: float | None,
) -> None:
    """Write RUN as an archive for release.

    The archive OUT is a folder with weights, recipe, curves, evaluations, model card and checksums.
    """
    from ijepa.planning.hardware import find_country
    from ijepa.release.archive import verify_archive, write_archive
    from ijepa.release.model_card import About

    if verify:
        if out is not None:
            raise UserError("--verify", "takes one folder", "write `ijepa archive --verify FOLDER`")
        with progress_lines() as progress:
            count = verify_archive(run, progress)
        click.echo(f"{run}: all {count} files are unchanged")
        return
    if out is None:
        raise UserError("OUT", "is missing", "write `ijepa archive RUN OUT`")
    find_country(country)
    about = About(license=license, country=country, watts=watts, dataset=dataset)
    with progress_lines() as progress:
        write_archive(run, out, about, unfinished=unfinished, progress=progress)
    click.echo(f"archive: {out}")
