"""What torch allows in place of float32: its switches as the number that the operators take.

They take it as an argument: a backward pass computes as its forward pass did, in whatever thread
and under whatever switch it runs, and what torch.compile traced keeps what held then.
"""

from __future__ import annotations

import torch

PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
_OF_SWITCH = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def allowed_precision(device: str) -> int:
    """What convolutions of float32 may round products to on devices of that type, of PRECISIONS.

    On GPUs TF32 ("high") or nothing: cuDNN's switch decides, which is on unless turned off. Else
    the switch of torch's CPU convolutions, or the global one where that is not set.
    """
    if device == "cuda":
        switch = getattr(torch.backends.cudnn, "conv", None)
        asked = getattr(switch, "fp32_precision", None)
        tf32 = torch.backends.cudnn.allow_tf32 if asked is None else asked == "tf32"
        return PRECISIONS["high" if tf32 else "highest"]
    switch = getattr(torch.backends.mkldnn, "conv", None)
    asked = _OF_SWITCH.get(getattr(switch, "fp32_precision", "none"))
    return PRECISIONS[asked or torch.get_float32_matmul_precision()]


# What torch.compiler.assume_constant_result does, which would import the compiler for it.
allowed_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
