"""What is worked out from what is measured."""

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
_PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12}


def peak_flops(device: str) -> float | None:
    """The dense bf16 peak of a GPU in FLOP/s, None where it is not known; the longest name that fits counts."""
    fitting = [name for name in _PEAKS if name in device]
    return _PEAKS[max(fitting, key=len)] if fitting else None


def mfu(pictures_per_second: float, macs: int, peak: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): three forward passes a picture."""
    return pictures_per_second * 3 * 2 * macs / peak
