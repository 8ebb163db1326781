"""The positional condition of section 4.2: where in the feature map a vector comes from."""

__all__ = ["positional_encoding_2d"]

import math

import torch


def positional_encoding_2d(channels: int, height: int, width: int) -> torch.Tensor:
    r"""Sine and cosine harmonics of a position, half of them for its column and half for its row.

    With :math:`\omega_j = 10000^{-2j / (C/2)}`, the condition vector of row ``h`` and column ``w`` is
    :math:`[\sin \omega_0 w, \cos \omega_0 w, \sin \omega_1 w, \dots, \sin \omega_0 h, \cos \omega_0 h, \dots]`.

    Args:
        channels: Length :math:`C` of a condition vector; a positive multiple of four (the paper uses 128).
        height: Rows of the feature map.
        width: Columns of the feature map.

    Returns:
        Condition vectors of shape ``(height * width, channels)``, row by row, in the default dtype.

    Raises:
        ValueError: If ``channels`` is not a positive multiple of four.

    References:
        CFLOW-AD, section 4.2; Vaswani et al., *Attention is all you need*, section 3.5, in its 2-D form.

    Example:
        >>> positional_encoding_2d(128, 32, 16).shape
        torch.Size([512, 128])
    """
    if channels <= 0 or channels % 4:
        msg = f"A 2-D positional encoding needs a positive multiple of four channels, got {channels}."
        raise ValueError(msg)
    half = channels // 2
    # Angles in float64: at large positions the high harmonics lose digits in float32.
    frequency = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(10_000.0) / half))

    def harmonics(length: int) -> torch.Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    columns = harmonics(width)[None].expand(height, -1, -1)
    rows = harmonics(height)[:, None].expand(-1, width, -1)
    # Where half precision is the default, whoever uses the table rounds it.
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).to(dtype)
