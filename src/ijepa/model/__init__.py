"""Encoders, predictor and loss: tensors and plain dataclasses, without files, other ranks and recipes."""
