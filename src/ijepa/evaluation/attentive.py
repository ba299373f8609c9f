"""Attentive heads: a learned query looks at all patches, and a linear layer reads what it saw.

The pooling is V-JEPA's (arXiv 2404.08471, `attentive_pooler.py`): one query, a pre-norm cross-attention block with an
MLP, then the linear layer. Several heads differ in learning rate and weight decay and read the same patches.

Keys and values are never made patch by patch. The query does not depend on the image, so its product with a patch's
key is that of the patch with one vector, the query seen through the key matrix; and a weighted sum of values is the
value of the weighted sum of patches. What is left to do for every patch is two products of N x D with D x (heads of
attention), for all heads at once: N D A operations instead of N D^2. The norm's gain and offset go the same way, and
what a key's bias adds to all patches alike falls out of the softmax. The function is the same as the block's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

from ijepa.errors import Refused
from ijepa.evaluation.result import ranks_of
from ijepa.model.initial import initialize


class AttentiveHead(nn.Module):
    """The parameters of one head, and what it does before and after the patches are pooled.

    Args:
        width: D.
        classes: C.
        attention_heads: A, divides D.
    """

    def __init__(self, width: int, classes: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.linear = nn.Linear(width, classes)

    def directions(self) -> Tensor:
        """Return (A, D): the score of a normalised patch is its product with these, up to a constant."""
        width = self.query.shape[1]
        query = self.q(self.query).view(self.attention_heads, -1)
        key = self.kv.weight[:width].unflatten(0, query.shape)
        return torch.einsum("ad,adk->ak", query, key) * self.norm1.weight / math.sqrt(query.shape[1])

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) for the attention's weighted sums of normalised patches (B, A, D)."""
        width = self.query.shape[1]
        shape = self.attention_heads, width // self.attention_heads
        value, bias = self.kv.weight[width:].unflatten(0, shape), self.kv.bias[width:].view(shape)
        seen = torch.einsum("bak,adk->bad", pooled * self.norm1.weight + self.norm1.bias, value) + bias
        x = self.query + self.proj(seen.flatten(1))
        x = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return self.linear(x)


class AttentiveHeads:
    """Attentive heads over the same patches, each with a learning rate and a weight decay of its own.

    Args:
        width: D.
        classes: C.
        grid: (learning rate, weight decay) of each of the H heads, the rate as it is at its peak.
        attention_heads: A; one for every 64 channels if None.
        betas: of AdamW.
        seed: of the start, which all heads share.
        device: where they are trained.

    Raises:
        Refused: attention heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: Sequence[tuple[float, float]],
        *,
        attention_heads: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        count = attention_heads or max(1, width // 64)
        if width % count:
            raise Refused(f"attention_heads = {count}", f"do not divide features of {width}", "give a divisor")
        self.heads = [AttentiveHead(width, classes, count) for _ in grid]
        groups = []
        for head, (lr, decay) in zip(self.heads, grid, strict=True):
            initialize(head, seed, prefix="evaluation.attentive.")
            for layer in (head.proj, head.fc2):  # they write into the residual stream
                layer.weight.data.div_(math.sqrt(2))
            head.to(device)
            for matrices in (True, False):
                chosen = [values for values in head.parameters() if (values.ndim > 1) == matrices]
                groups.append({"params": chosen, "weight_decay": decay if matrices else 0.0, "lr": lr, "peak": lr})
        self._optimizer = torch.optim.AdamW(groups, betas=betas)

    def __len__(self) -> int:
        return len(self.heads)

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """Train every head by one batch: patches (B, N, D), classes (B,), `factor` on the rates."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self._optimizer.zero_grad()
        with torch.enable_grad():
            logits = self._logits(x)
            # The sum over heads of each one's mean: their gradients do not touch.
            truth = y.to(self.device).repeat_interleave(len(self))
            loss = len(self) * cross_entropy(logits.flatten(0, 1), truth)
            loss.backward()
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for patches (B, N, D)."""
        return self._logits(x)

    def ranks(self, x: Tensor, y: Tensor, head: int) -> Tensor:
        """Return the true classes' ranks (B,) by one head."""
        return ranks_of(self.logits(x)[:, head], y.to(self.device)).cpu()

    def _logits(self, x: Tensor) -> Tensor:
        patches = layer_norm(x.to(self.device, torch.float32), x.shape[-1:])
        directions = torch.cat([head.directions() for head in self.heads])
        weights = (patches @ directions.T).softmax(1)
        pooled = (weights.transpose(1, 2) @ patches).unflatten(1, (len(self), -1))
        return torch.stack([head(part) for head, part in zip(self.heads, pooled.unbind(1), strict=True)], dim=1)
