"""What a machine computes in."""

from pathlib import Path


def cpu_is_fast_in_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16 matrices (AMX or AVX-512 BF16).

    With them scoring is 1.7 to 3 times as fast as in fp32. ARM's were not measured. Does without torch, whose import
    takes seconds.
    """
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def computes_bfloat16() -> bool:
    """Whether this machine's GPU, or its CPU if it has no GPU, supports bfloat16 natively.

    On CPUs without such instructions bfloat16 is much slower than fp32.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))
