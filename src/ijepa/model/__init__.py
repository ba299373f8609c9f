"""The mathematics: encoders, predictor and loss; tensors only, no files, no other ranks, no recipe."""
