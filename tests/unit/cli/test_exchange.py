import json

from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.interop.exchange import export_weights


def test_the_command_accepts_which_and_weights_and_heads(tiny, tmp_path):
    file = export_weights(tiny, tmp_path / "one.safetensors", "safetensors", which="context")
    for flag in ("--which", "--weights"):
        words = ["export", str(file), str(tmp_path / flag), "--format", "timm", flag, "context", "--heads", "4"]
        CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)
        assert json.loads((tmp_path / flag / "config.json").read_text())["ijepa"]["encoder"] == "context"
