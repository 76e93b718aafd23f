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

# Parameters are the fields of csrc/rows.h's structs, by keyword. A pointer is an int, or None; those that are not given
# are null and numbers 0, or what the struct says. TypeError names a field that is not there.
Field = int | float | bool | DType | None

class PrepareParams:
    def __init__(self, **fields: Field) -> None: ...

class MergeParams:
    def __init__(self, **fields: Field) -> None: ...

class SettleParams:
    def __init__(self, **fields: Field) -> None: ...

class ScaleRowsParams:
    def __init__(self, **fields: Field) -> None: ...

class WeighParams:
    def __init__(self, **fields: Field) -> None: ...

class FinishParams:
    def __init__(self, **fields: Field) -> None: ...

def build_info() -> BuildInfo: ...

# Asynchronous on the stream, which must belong to the current device.
def prepare(params: PrepareParams, stream: int) -> None: ...
def merge(params: MergeParams, stream: int) -> None: ...
def settle(params: SettleParams, stream: int) -> None: ...
def scale_rows(params: ScaleRowsParams, stream: int) -> None: ...
def weigh(params: WeighParams, stream: int) -> None: ...
def finish(params: FinishParams, stream: int) -> None: ...
