"""The types that numbers have in GGUF files, and how their blocks are packed.

ggml's, by the numbers that stand in files. Not the ``gguf`` package's table: that brings NumPy into the server, which
reads headers of every model. The same values, so its functions take these; a test holds the two together.
"""

from enum import IntEnum

_K = 256
"""Numbers in a block of the K- and IQ-types."""


class Kind(IntEnum):
    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


BLOCKS: dict[Kind, tuple[int, int]] = {
    Kind.F32: (1, 4),
    Kind.F16: (1, 2),
    Kind.Q4_0: (32, 18),
    Kind.Q4_1: (32, 20),
    Kind.Q5_0: (32, 22),
    Kind.Q5_1: (32, 24),
    Kind.Q8_0: (32, 34),
    Kind.Q8_1: (32, 40),
    Kind.Q2_K: (_K, 84),
    Kind.Q3_K: (_K, 110),
    Kind.Q4_K: (_K, 144),
    Kind.Q5_K: (_K, 176),
    Kind.Q6_K: (_K, 210),
    Kind.Q8_K: (_K, 292),
    Kind.IQ2_XXS: (_K, 66),
    Kind.IQ2_XS: (_K, 74),
    Kind.IQ3_XXS: (_K, 98),
    Kind.IQ1_S: (_K, 50),
    Kind.IQ4_NL: (32, 18),
    Kind.IQ3_S: (_K, 110),
    Kind.IQ2_S: (_K, 82),
    Kind.IQ4_XS: (_K, 136),
    Kind.I8: (1, 1),
    Kind.I16: (1, 2),
    Kind.I32: (1, 4),
    Kind.I64: (1, 8),
    Kind.F64: (1, 8),
    Kind.IQ1_M: (_K, 56),
    Kind.BF16: (1, 2),
    Kind.TQ1_0: (_K, 54),
    Kind.TQ2_0: (_K, 66),
    Kind.MXFP4: (32, 17),
    Kind.NVFP4: (64, 36),
    Kind.Q1_0: (128, 18),
}
"""Numbers and bytes of a block."""
