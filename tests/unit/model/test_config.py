from ijepa.model.config import EncoderConfig, ModelConfig, PredictorConfig


def test_grid_is_rows_and_columns_of_patches():
    config = ModelConfig(
        image_size=(64, 96),
        patch_size=16,
        encoder=EncoderConfig(width=32, depth=1, heads=2),
        predictor=PredictorConfig(width=16, depth=1, heads=2),
    )
    assert config.grid == (4, 6)
