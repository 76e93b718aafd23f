"""How wide rows are read and written.

Triton makes an access as wide as what it knows to divide a row's address and the end of its mask, up to 16 bytes. Of an
integer argument it knows whether 16 divides it, and nothing of 8 or 4: at D = 1000, 16-bit rows were read element by
element. So launchers say what divides sizes and strides, as a constant WIDE.
"""

import triton
import triton.language as tl


@triton.jit
def up(n, WIDE: tl.constexpr):
    """Returns n rounded up to a multiple of WIDE, which the compiler then knows. 16 is what it knows by itself."""
    if WIDE == 1 or WIDE == 16:
        return n
    else:
        return tl.cdiv(n, WIDE) * WIDE
