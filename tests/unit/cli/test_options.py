import pytest
from click.testing import CliRunner

from ijepa.cli import cli
from ijepa.config.recipe import Recipe


def test_pretrain_help_lists_every_field():
    text = CliRunner().invoke(cli, ["pretrain", "--help"]).output
    for key, _, meaning, _ in Recipe.iter_fields():
        assert f"--{key} " in text and meaning.split()[0] in text
    assert "Recipe: optimizer" in text


@pytest.mark.parametrize(
    ("flag", "words", "default"),
    [
        ("precision.fp8", "none|tensorwise|rowwise", "none"),
        ("precision.attention", "auto|flash|cudnn|efficient|math", "auto"),
        ("model.encoder.initial", "normal|xavier", "normal"),
        ("batch.pad_to_budget", "BOOL|auto", "auto"),
        ("data.workers", "N|auto", "auto"),
        ("model.image_size", "HEIGHT,WIDTH", "224,224"),
        ("optimizer.betas", "LOW,HIGH", "0.9,0.95"),
        ("schedule.warmup", "LENGTH", "40 epochs"),
        ("epochs", "X", None),
    ],
)
def test_pretrain_help_states_type_and_default(flag, words, default):
    text = CliRunner().invoke(cli, ["pretrain", "--help"]).output
    mine, _, rest = text.partition(f"  --{flag} {words}")[2].partition("\n  --")
    assert rest and (f"[default: {default}]" in " ".join(mine.split()) if default else "default" not in mine)
