"""Attentive heads: a learned query looks at all patches, and a linear layer reads what it saw.

`AttentiveHead` is V-JEPA's (arXiv 2404.08471, `attentive_pooler.py`): one query, a pre-norm cross-attention block with
an MLP, then the linear layer. `QueryHead` is CAPI's (arXiv 2502.08769, `eval_classification.py`): query, keys, values
and the linear layer alone. Several heads differ in learning rate and weight decay and read the same patches.

Keys and values are never made patch by patch. The query does not depend on the image, so its product with a patch's
key is that of the patch with one vector, the query seen through the key matrix; and a weighted sum of values is the
value of the weighted sum of patches. What is left to do for every patch is two products of N x D with D x (heads of
attention), for all heads at once: N D A operations instead of N D^2. The norm's gain and offset go the same way, and
what a key's bias adds to all patches alike falls out of the softmax. The function is the same as the block's. Pooled
patches take 4 A D bytes an image and head, and as much again in training.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

from ijepa.evaluation.metrics.accuracy import ranks_of
from ijepa.model.init import init_weights
from ijepa.utils.errors import UserError


class AttentiveHead(nn.Module):
    """The parameters of one head, and what it does before and after the patches are pooled.

    Args:
        width: D.
        classes: C.
        attention_heads: A, divides D.
    """

    normalises = True
    """Whether it pools patches at mean 0 and deviation 1 over their channels."""

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


class QueryHead(nn.Module):
    """As `AttentiveHead`, with nothing around the attention: no norm, projection or MLP, and the query is its own."""

    normalises = False

    def __init__(self, width: int, classes: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.kv = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, classes)

    def directions(self) -> Tensor:
        """Return (A, D): the score of a patch is its product with these, up to a constant."""
        width = self.query.shape[1]
        query = self.query.view(self.attention_heads, -1)
        key = self.kv.weight[:width].unflatten(0, query.shape)
        return torch.einsum("ad,adk->ak", query, key) / math.sqrt(query.shape[1])

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) for the attention's weighted sums of patches (B, A, D)."""
        width = self.query.shape[1]
        value = self.kv.weight[width:].unflatten(0, (self.attention_heads, -1))
        return self.linear(torch.einsum("bak,adk->bad", pooled, value).flatten(1) + self.kv.bias[width:])


class AttentiveHeads:
    """Attentive heads over the same patches, each with a learning rate and a weight decay of its own.

    Args:
        width: D.
        classes: C.
        grid: (learning rate, weight decay) of each of the H heads, the rate as it is at its peak.
        kind: of head.
        attention_heads: A; one for every 64 channels if None.
        betas: of AdamW.
        clip: length to which each head's gradient is cut; no bound if None.
        final_decay: what decays fall to by a cosine; they stay if None.
        seed: of the start, which all heads share.
        device: where they are trained.

    Raises:
        UserError: attention heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: Sequence[tuple[float, float]],
        *,
        kind: type[AttentiveHead] | type[QueryHead] = AttentiveHead,
        attention_heads: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = None,
        final_decay: float | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.clip, self.final_decay = torch.device(device), clip, final_decay
        count = attention_heads or max(1, width // 64)
        if width % count:
            raise UserError(f"attention_heads = {count}", f"do not divide features of {width}", "give a divisor")
        self.heads = [kind(width, classes, count) for _ in grid]
        groups = []
        for head, (lr, decay) in zip(self.heads, grid, strict=True):
            init_weights(head, seed, prefix="evaluation.attentive.")
            for layer in (head.proj, head.fc2) if isinstance(head, AttentiveHead) else ():
                layer.weight.data.div_(math.sqrt(2))  # they write into the residual stream
            head.to(device)
            for matrices in (True, False):
                chosen = [values for values in head.parameters() if (values.ndim > 1) == matrices]
                decayed = decay if matrices else 0.0
                groups.append({"params": chosen, "weight_decay": decayed, "first": decayed, "lr": lr, "peak": lr})
        self._optimizer = torch.optim.AdamW(groups, betas=betas)

    def __len__(self) -> int:
        return len(self.heads)

    def step(self, x: Tensor, y: Tensor, factor: float, progress: float = 0.0) -> None:
        """Train every head by one batch: patches (B, N, D), classes (B,).

        `factor` is on the rates, `progress` the share of the steps that are done, where decays fall.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
            if self.final_decay is not None and group["first"]:
                left = (1 + math.cos(math.pi * progress)) / 2
                group["weight_decay"] = self.final_decay + (group["first"] - self.final_decay) * left
        self._optimizer.zero_grad()
        with torch.enable_grad():
            logits = self._logits(x)
            # The sum over heads of each one's mean: their gradients do not touch.
            truth = y.to(self.device).repeat_interleave(len(self))
            loss = len(self) * cross_entropy(logits.flatten(0, 1), truth)
            loss.backward()
        if self.clip is not None:
            for head in self.heads:
                nn.utils.clip_grad_norm_(head.parameters(), self.clip)
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for patches (B, N, D)."""
        return self._logits(x)

    def ranks(self, x: Tensor, y: Tensor, head: int) -> Tensor:
        """Return the true classes' ranks (B,) by one head."""
        return ranks_of(self.logits(x)[:, head], y.to(self.device)).cpu()

    def _logits(self, x: Tensor) -> Tensor:
        patches = x.to(self.device, torch.float32)
        if self.heads[0].normalises:
            patches = layer_norm(patches, x.shape[-1:])
        directions = torch.cat([head.directions() for head in self.heads])
        weights = (patches @ directions.T).softmax(1)
        pooled = (weights.transpose(1, 2) @ patches).unflatten(1, (len(self), -1))
        return torch.stack([head(part) for head, part in zip(self.heads, pooled.unbind(1), strict=True)], dim=1)
