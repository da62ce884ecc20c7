"""What all tokenizers share: the type of their ids, and a text that tells whether one gives back what it was given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
PROBE = "  def f(x):\n\t return  'caf\u00e9 \ufb01 \u2581 \u4e16\u754c\U0001f642 \u3000'\r\n \x00"
