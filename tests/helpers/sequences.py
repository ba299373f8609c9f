"""Packed sequences for tests of attention."""

import numpy as np
import torch

from ijepa.masking.batch import Sequences


def sequences(lengths, empty=0, limit=0):
    ends = np.concatenate([[0], np.cumsum([*lengths, *[0] * empty])]).astype(np.int32)
    return Sequences(torch.arange(int(ends[-1])), torch.from_numpy(ends), tuple(lengths), limit)
