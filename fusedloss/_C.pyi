# What csrc/bindings.cpp exports. The module is there only where nvcc was when the package was built.
import enum
from typing import TypedDict

class BuildInfo(TypedDict):
    cuda_version: str
    archs: list[str]

class DType(enum.Enum):
    float32 = 0
    float16 = 1
    bfloat16 = 2

def build_info() -> BuildInfo: ...
def scale_rows(
    input: int,
    out: int,
    out_dtype: DType,
    *,
    row_factor: int = 0,
    scalar: int = 0,
    M: int,
    D: int,
    in_stride: int,
    out_stride: int,
    stream: int,
) -> None: ...
