"""The marks of every test in tests/gpu."""

from __future__ import annotations

import pytest
import torch

ON_A_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
    # Time on a card is precious: no library's warning may cost a result. Our own still does.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:epsanet_fused:RuntimeWarning"),
]
