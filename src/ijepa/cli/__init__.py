"""The commands. This room alone knows all others; heavy ones are imported when their command runs.

Every field of a recipe is a dotted flag of `ijepa pretrain`; the flags, their help and their checks all come from the
recipe's own types, so that a new field needs nothing here.
"""

import click

from ijepa import __version__
from ijepa.cli.archive import archive
from ijepa.cli.bench import bench
from ijepa.cli.data import data
from ijepa.cli.evaluate import diagnose, evaluate, report
from ijepa.cli.exchange import export, import_
from ijepa.cli.log import log_to_terminal
from ijepa.cli.train import demo, plan, pretrain

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="ijepa")
@click.pass_context
def cli(context: click.Context) -> None:
    """Pretrain I-JEPA models and evaluate them.

    A recipe (a preset or a YAML file) defines a pretraining run. A protocol defines an evaluation. Most protocols
    follow a published one.
    """
    context.with_resource(log_to_terminal())


for command in (pretrain, plan, demo, evaluate, diagnose, report, export, import_, archive, data, bench):
    cli.add_command(command)
