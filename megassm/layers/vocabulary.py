"""The two ends of a model, where token ids come in and predictions leave.

A model that holds a part of the vocabulary has another one (`megassm.parallel.tensor.SplitVocabulary`).

Shapes: B batch, L length, D width, V outputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megassm.ops.losses import Combine, divergences, token_losses


class Vocabulary:
    """All of the vocabulary in one place."""

    first_output = 0
    """That of the logits' first column."""
    combine: Combine | None = None
    """Of what other holders have of a row of logits."""

    def embed(self, ids: Tensor, embedding_VD: Tensor) -> Tensor:
        """Rows of the embedding, (..., D)."""
        return F.embedding(ids, embedding_VD)

    def logits(self, x: Tensor, head_VD: Tensor) -> Tensor:
        """Logits (..., V), in the form that `losses`, `hits` and `divergences` take."""
        return F.linear(x, head_VD)

    def losses(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """Negative log-likelihood in nats, (B, L) float32."""
        targets_N = targets_BL.flatten()
        if self.first_output:
            targets_N = targets_N - self.first_output
        return token_losses(logits_BLV.flatten(0, 1), targets_N, self.combine).view_as(targets_BL)

    def hits(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """1 where the target is the most likely of all, else 0; 1/n where n are equally likely. (B, L) float32."""
        best_BLV = logits_BLV == logits_BLV.amax(-1, keepdim=True)
        hit_BL1 = best_BLV.gather(-1, targets_BL[..., None])
        return hit_BL1[..., 0].float() / best_BLV.sum(-1)

    def divergences(self, logits_BLV: Tensor, teacher_BLV: Tensor, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) of the predictions at temperature T, (B, L) float32 (arXiv 1503.02531)."""
        kl_N = divergences(logits_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), temperature, self.combine)
        return temperature**2 * kl_N.view(logits_BLV.shape[:-1])
