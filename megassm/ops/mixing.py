"""The gate's weights, and the gated features' one matrix product.

    shat  = sqrt(K) s / max(||s||_2, eps)               over the K leading scores (ES-SSM, Eq. 8b)
    alpha = softmax(shat)
    y     = sum_{k<=K} alpha_k sigma_k^(1/4) M_k f_k    as one product with inner dimension K*D

Shapes: B batch, L length, K channels within the budget, D inputs, E outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-6


def gate_weights(scores_BLK: Tensor, rescale: bool) -> Tensor:
    """alpha (B, L, K) in at least float32: the masked softmax, given only the scores within the budget.

    With `rescale` the scores' root mean square is 1 first, so that the softmax's temperature does not depend on K.
    """
    scores_BLK = scores_BLK.to(torch.promote_types(scores_BLK.dtype, torch.float32))
    if rescale:
        norm_BL1 = torch.linalg.vector_norm(scores_BLK, dim=-1, keepdim=True)
        scores_BLK = scores_BLK * (scores_BLK.shape[-1] ** 0.5 / norm_BL1.clamp_min(NORM_FLOOR))
    return scores_BLK.softmax(dim=-1)


def mix_channels(features_BLKD: Tensor, weights_BLK: Tensor, channels_KDE: Tensor) -> Tensor:
    """sum_k weights[k] * (features[k] @ channels[k]), (B, L, E), without forming any (B, L, K, E) product."""
    gated_BLKD = features_BLKD * weights_BLK[..., None]
    return gated_BLKD.flatten(2).to(channels_KDE.dtype) @ channels_KDE.flatten(0, 1)
