"""Attentive heads: a learned query pools all patches by attention, and a linear layer reads the result.

`AttentiveHead` is that of V-JEPA (Bardes et al., arXiv 2404.08471, `attentive_pooler.py`): one query, a pre-norm
cross-attention block with an MLP, then the linear layer. `QueryHead` is that of CAPI (Darcet et al., arXiv 2502.08769,
`eval_classification.py`): query, keys, values and the linear layer only. Several heads, with different learning rates
and weight decays, read the same patches.

Keys and values of single patches are never computed. The query does not depend on the image, so query . (K patch) is
(K^T query) . patch, and a weighted sum of values is the value of the weighted sum of patches. Two products (N, D) x
(D, A) remain for the patches of an image, where A counts the attention heads of all heads: N D A operations instead
of N D^2. Gain and offset of the norm are folded in the same way, and the bias of the keys, which adds the same to the
scores of all patches, cancels in the softmax. The result is that of the published block. Pooled patches take 4 A D
bytes per image, and twice that in training.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

from ijepa.evaluation.classification.optimizers import parameter_groups, set_rates
from ijepa.evaluation.metrics.accuracy import class_ranks
from ijepa.model.init import init_weights
from ijepa.utils.errors import UserError
from ijepa.utils.schedules import half_cosine


class QueryHead(nn.Module):
    """A head with nothing around the attention; the query is a parameter itself.

    Args:
        width: D.
        classes: C.
        attention_heads: A, a divisor of D.
    """

    normalizes = False
    """Whether it pools patches that are normalized to mean 0 and standard deviation 1 over their channels."""

    def __init__(self, width: int, classes: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.kv = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, classes)

    def directions(self) -> Tensor:
        """Return (A, D): the attention score of a patch is its product with these, up to a constant."""
        return self._directions(self.query)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) for pooled patches (B, A, D)."""
        return self.linear(self._values(pooled))

    def _directions(self, query: Tensor) -> Tensor:
        """Return K^T query / sqrt(D / A) for a query (1, D): (A, D)."""
        query = query.view(self.attention_heads, -1)  # (A, D / A)
        key = self.kv.weight[: query.numel()].unflatten(0, query.shape)  # (A, D / A, D)
        return torch.einsum("ad,adk->ak", query, key) / math.sqrt(query.shape[1])

    def _values(self, pooled: Tensor) -> Tensor:
        """Return the values (B, D) of pooled patches (B, A, D)."""
        width = pooled.shape[2]
        value = self.kv.weight[width:].unflatten(0, (self.attention_heads, -1))  # (A, D / A, D)
        return torch.einsum("bak,adk->bad", pooled, value).flatten(1) + self.kv.bias[width:]


class AttentiveHead(QueryHead):
    """A head with a projected query, norms, output projection and MLP around the attention. Arguments as there."""

    normalizes = True

    def __init__(self, width: int, classes: int, attention_heads: int) -> None:
        super().__init__(width, classes, attention_heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def directions(self) -> Tensor:
        """Return (A, D): the attention score of a normalized patch is its product with these, up to a constant."""
        return self._directions(self.q(self.query)) * self.norm1.weight

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) for pooled normalized patches (B, A, D)."""
        x = self.query + self.proj(self._values(pooled * self.norm1.weight + self.norm1.bias))
        x = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return self.linear(x)


class AttentiveHeads:
    """Attentive heads on the same patches, each with its own learning rate and weight decay, trained by AdamW.

    Args:
        width: D.
        classes: C.
        grid: (peak learning rate, weight decay) of each of the H heads.
        kind: class of the heads.
        attention_heads: A; one for every 64 channels if None.
        betas: of AdamW.
        clip: largest norm of the gradient of a head, to which it is clipped; None: no clipping.
        final_decay: weight decay at the end, which a cosine schedule reaches; None: weight decay is constant.
        seed: seed of the initial values, which are the same for all heads.
        device: device of the parameters.

    Raises:
        UserError: the number of attention heads does not divide the width.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: Sequence[tuple[float, float]],
        *,
        kind: type[QueryHead] = AttentiveHead,
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
            raise UserError(
                f"attention_heads = {count}", f"does not divide the feature width {width}", "choose a divisor"
            )
        self.heads = [kind(width, classes, count) for _ in grid]
        settings = []
        for head, (lr, weight_decay) in zip(self.heads, grid, strict=True):
            init_weights(head, seed, prefix="evaluation.attentive.")
            if isinstance(head, AttentiveHead):
                # As in V-JEPA: what is added to the residual stream is divided by sqrt(2 * layer), here layer 1.
                for layer in (head.proj, head.fc2):
                    layer.weight.data.div_(math.sqrt(2))
            head.to(device)
            settings += [(values, lr, weight_decay if values.ndim > 1 else 0.0) for values in head.parameters()]
        groups = parameter_groups(settings)
        for group in groups:
            group["first_decay"] = group["weight_decay"]
        self._optimizer = torch.optim.AdamW(groups, betas=betas)

    def __len__(self) -> int:
        return len(self.heads)

    @torch.enable_grad()
    def step(self, x: Tensor, y: Tensor, factor: float, progress: float = 0.0) -> None:
        """Train each head on one batch.

        Args:
            x: patches (B, N, D).
            y: classes (B,).
            factor: factor on the peak learning rates.
            progress: share of the steps that are done, for the schedule of the weight decay.
        """
        set_rates(self._optimizer, factor)
        for group in self._optimizer.param_groups:
            if self.final_decay is not None and group["first_decay"]:
                fall = group["first_decay"] - self.final_decay
                group["weight_decay"] = self.final_decay + fall * half_cosine(progress)
        self._optimizer.zero_grad()
        logits = self._logits(x)
        # The sum of the heads' mean losses: its gradient by the parameters of a head is that of the head's own loss.
        truth = y.to(self.device).repeat_interleave(len(self))
        (cross_entropy(logits.flatten(0, 1), truth) * len(self)).backward()
        if self.clip is not None:
            for head in self.heads:
                nn.utils.clip_grad_norm_(head.parameters(), self.clip)
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for patches (B, N, D)."""
        return self._logits(x)

    def class_ranks(self, x: Tensor, y: Tensor, head: int) -> Tensor:
        """Return the ranks (B,) of the true classes `y` by one head."""
        return class_ranks(self.logits(x)[:, head], y.to(self.device)).cpu()

    def _logits(self, x: Tensor) -> Tensor:
        patches = x.to(self.device, torch.float32)
        if self.heads[0].normalizes:
            patches = layer_norm(patches, x.shape[-1:])
        directions = torch.cat([head.directions() for head in self.heads])  # (H * A, D)
        attention = (patches @ directions.T).softmax(1)  # (B, N, H * A), over the patches
        pooled = (attention.transpose(1, 2) @ patches).unflatten(1, (len(self), -1))  # (B, H, A, D)
        return torch.stack([head(part) for head, part in zip(self.heads, pooled.unbind(1), strict=True)], dim=1)
