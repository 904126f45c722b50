"""What a machine computes in."""

import torch


def computes_bfloat16() -> bool:
    """Whether this machine's GPU, or its CPU if it has no GPU, supports bfloat16 natively.

    On CPUs without such instructions bfloat16 is much slower than fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))
