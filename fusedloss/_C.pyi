# What csrc/bindings.cpp exports. The module is there only where nvcc was when the package was built.
import enum
from typing import TypedDict

class BuildInfo(TypedDict):
    cuda_version: str  # of the runtime, which is linked statically
    driver_version: str  # the newest CUDA that the driver here runs; "" without one
    archs: list[str]

class DType(enum.Enum):
    float32 = 0
    float16 = 1
    bfloat16 = 2

class Plan:
    """Which kernel runs a launch: csrc/similarity.h."""

    capability: int
    BLOCK_M: int
    BLOCK_N: int
    cluster: int
    blocks: int

def build_info() -> BuildInfo: ...
def plan(capability: int, tensor_cores: bool, aligned: bool, narrow: bool) -> Plan: ...

# Of a struct what is not given is null, 0, or what the field's line says. TypeError names a field that is not there.
# Launches are asynchronous on the stream, which must belong to the current device.
Pointer = int | None

# Written by tools/extension_stub.py from csrc/*_fields.h, where every field is explained.
class PrepareParams:
    def __init__(
        self,
        *,
        x: Pointer = ...,
        y: Pointer = ...,
        dtype: DType = ...,
        target: Pointer = ...,
        scale: Pointer = ...,
        bias: Pointer = ...,
        row_factor: Pointer = ...,
        col_factor: Pointer = ...,
        score: Pointer = ...,
        target_sim: Pointer = ...,
        slope: Pointer = ...,
        M: int = ...,
        N: int = ...,
        D: int = ...,
        stride_xm: int = ...,
        stride_xd: int = ...,
        stride_yn: int = ...,
        stride_yd: int = ...,
        softcap: float = ...,
        margin_angle: float = ...,
        margin_cosine: float = ...,
    ) -> None: ...

class MergeParams:
    def __init__(
        self,
        *,
        max: Pointer = ...,
        sum: Pointer = ...,
        running_max: Pointer = ...,
        running_sum: Pointer = ...,
        n_tiles: int = ...,
        R: int = ...,
    ) -> None: ...

class SettleParams:
    def __init__(
        self,
        *,
        max: Pointer = ...,
        sum: Pointer = ...,
        shift: float = ...,
        score: Pointer = ...,
        weight: Pointer = ...,
        label_smoothing: float = ...,
        copies: float = ...,
        z_loss: float = ...,
        decoupled: bool = ...,
        smooth: Pointer = ...,
        slope: Pointer = ...,
        row_shift: Pointer = ...,
        over_l: Pointer = ...,
        entry: Pointer = ...,
        loss: Pointer = ...,
        out: Pointer = ...,
        out_dtype: DType = ...,
        target: Pointer = ...,
        row_factor: Pointer = ...,
        col_factor: Pointer = ...,
        stride_om: int = ...,
        n_tiles: int = ...,
        R: int = ...,
    ) -> None: ...

class ScaleRowsParams:
    def __init__(
        self,
        *,
        input: Pointer = ...,
        out: Pointer = ...,
        in_dtype: DType = ...,
        out_dtype: DType = ...,
        row_factor: Pointer = ...,
        scalar: Pointer = ...,
        M: int = ...,
        D: int = ...,
        in_stride: int = ...,
        in_stride_d: int = ...,
        out_stride: int = ...,
    ) -> None: ...

class WeighParams:
    def __init__(
        self,
        *,
        out: Pointer = ...,
        dtype: DType = ...,
        row_weight: Pointer = ...,
        col_weight: Pointer = ...,
        entry: Pointer = ...,
        target: Pointer = ...,
        row_factor: Pointer = ...,
        col_factor: Pointer = ...,
        R: int = ...,
        N: int = ...,
        stride_om: int = ...,
    ) -> None: ...

class FinishParams:
    def __init__(
        self,
        *,
        total: Pointer = ...,
        over_l: Pointer = ...,
        scale: Pointer = ...,
        gain: Pointer = ...,
        x: Pointer = ...,
        factor: Pointer = ...,
        out: Pointer = ...,
        x_dtype: DType = ...,
        out_dtype: DType = ...,
        R: int = ...,
        D: int = ...,
        stride_tm: int = ...,
        stride_xm: int = ...,
        stride_xd: int = ...,
        stride_om: int = ...,
    ) -> None: ...

class Masks:
    def __init__(
        self,
        *,
        drop_rows: list[Pointer] = ...,
        drop_keys: list[Pointer] = ...,
        keep_rows: list[Pointer] = ...,
        keep_keys: list[Pointer] = ...,
        dense: Pointer = ...,
        bits: Pointer = ...,
        threshold: Pointer = ...,
        exempt: list[Pointer] = ...,
        skip: Pointer = ...,
        own: Pointer = ...,
        own_scale: Pointer = ...,
        stride_dm: int = ...,
        stride_dn: int = ...,
        stride_bm: int = ...,
    ) -> None: ...

class Strip:
    def __init__(
        self,
        *,
        x: Pointer = ...,
        y: Pointer = ...,
        out: Pointer = ...,
        M: int = ...,
        N: int = ...,
        D: int = ...,
        stride_xm: int = ...,
        stride_xd: int = ...,
        stride_yn: int = ...,
        stride_yd: int = ...,
        stride_om: int = ...,
        scale: Pointer = ...,
        row_factor: Pointer = ...,
        col_factor: Pointer = ...,
        bias: Pointer = ...,
        softcap: float = ...,
        target: Pointer = ...,
        tensor_cores: bool = ...,
        masks: Masks = ...,
    ) -> None: ...

class TallyArgs:
    def __init__(
        self,
        *,
        score: Pointer = ...,
        count: Pointer = ...,
        above: Pointer = ...,
        max: Pointer = ...,
        z: Pointer = ...,
        sim: Pointer = ...,
    ) -> None: ...

class StatsArgs:
    def __init__(
        self,
        *,
        row_max: Pointer = ...,
        row_sum: Pointer = ...,
        col_max: Pointer = ...,
        col_sum: Pointer = ...,
        tally: TallyArgs = ...,
    ) -> None: ...

class ExpArgs:
    def __init__(
        self,
        *,
        shift: float = ...,
        row_sum: Pointer = ...,
        col_sum: Pointer = ...,
        tally: TallyArgs = ...,
    ) -> None: ...

class GradArgs:
    def __init__(
        self,
        *,
        gain: Pointer = ...,
        row_shift: Pointer = ...,
        row_weight: Pointer = ...,
        entry: Pointer = ...,
        row_target_sim: Pointer = ...,
        col_shift: Pointer = ...,
        col_weight: Pointer = ...,
        col_target_sim: Pointer = ...,
        q: Pointer = ...,
        smooth: Pointer = ...,
    ) -> None: ...

class TopArgs:
    def __init__(
        self,
        *,
        top: Pointer = ...,
        column: Pointer = ...,
    ) -> None: ...

class OpposedArgs:
    def __init__(
        self,
        *,
        row_labels: Pointer = ...,
        key_labels: Pointer = ...,
        own: Pointer = ...,
        row_bias: Pointer = ...,
        col_bias: Pointer = ...,
        other: Pointer = ...,
        other_column: Pointer = ...,
        alike: Pointer = ...,
        alike_column: Pointer = ...,
        col_other: Pointer = ...,
        col_other_row: Pointer = ...,
        col_alike: Pointer = ...,
        col_alike_row: Pointer = ...,
    ) -> None: ...

class PickArgs:
    def __init__(
        self,
        *,
        picked: Pointer = ...,
    ) -> None: ...

class BitsArgs:
    def __init__(
        self,
        *,
        threshold: Pointer = ...,
        bits: Pointer = ...,
        words: int = ...,
    ) -> None: ...

class StoreArgs:
    def __init__(self) -> None: ...

class FoldArgs:
    def __init__(
        self,
        *,
        weight: Pointer = ...,
        row_labels: Pointer = ...,
        key_labels: Pointer = ...,
        own: Pointer = ...,
        target_value: Pointer = ...,
        sigmoid_bias: Pointer = ...,
        margin: float = ...,
        sign: float = ...,
        pulls: bool = ...,
        loss: Pointer = ...,
        count: Pointer = ...,
        scale_grad: Pointer = ...,
        bias_grad: Pointer = ...,
        col_weight: Pointer = ...,
        col_loss: Pointer = ...,
        col_count: Pointer = ...,
    ) -> None: ...

class SidesArgs:
    def __init__(
        self,
        *,
        row_labels: Pointer = ...,
        key_labels: Pointer = ...,
        own: Pointer = ...,
        pull: float = ...,
        push: float = ...,
        pull_base: float = ...,
        push_base: float = ...,
        margin: float = ...,
        gamma: float = ...,
        pull_max: Pointer = ...,
        pull_sum: Pointer = ...,
        push_max: Pointer = ...,
        push_sum: Pointer = ...,
        count: Pointer = ...,
        col_pull_max: Pointer = ...,
        col_pull_sum: Pointer = ...,
        col_push_max: Pointer = ...,
        col_push_sum: Pointer = ...,
        pull_shift: Pointer = ...,
        pull_weight: Pointer = ...,
        push_shift: Pointer = ...,
        push_weight: Pointer = ...,
        col_pull_shift: Pointer = ...,
        col_pull_weight: Pointer = ...,
        col_push_shift: Pointer = ...,
        col_push_weight: Pointer = ...,
        q: Pointer = ...,
    ) -> None: ...

def prepare(params: PrepareParams, stream: int) -> None: ...
def merge(params: MergeParams, stream: int) -> None: ...
def settle(params: SettleParams, stream: int) -> None: ...
def scale_rows(params: ScaleRowsParams, stream: int) -> None: ...
def weigh(params: WeighParams, stream: int) -> None: ...
def finish(params: FinishParams, stream: int) -> None: ...
def stats(strip: Strip, dtype: DType, args: StatsArgs, plan: Plan, stream: int) -> None: ...
def exp(strip: Strip, dtype: DType, args: ExpArgs, plan: Plan, stream: int) -> None: ...
def grad(strip: Strip, dtype: DType, args: GradArgs, plan: Plan, stream: int) -> None: ...
def top(strip: Strip, dtype: DType, args: TopArgs, plan: Plan, stream: int) -> None: ...
def opposed(strip: Strip, dtype: DType, args: OpposedArgs, plan: Plan, stream: int) -> None: ...
def pick(strip: Strip, dtype: DType, args: PickArgs, plan: Plan, stream: int) -> None: ...
def guide(strip: Strip, dtype: DType, args: BitsArgs, plan: Plan, stream: int) -> None: ...
def store(strip: Strip, dtype: DType, args: StoreArgs, plan: Plan, stream: int) -> None: ...
def sigmoid(strip: Strip, dtype: DType, args: FoldArgs, plan: Plan, stream: int) -> None: ...
def margin_ranking(strip: Strip, dtype: DType, args: FoldArgs, plan: Plan, stream: int) -> None: ...
def pair_hinge(strip: Strip, dtype: DType, args: FoldArgs, plan: Plan, stream: int) -> None: ...
def sides_stats(strip: Strip, dtype: DType, args: SidesArgs, plan: Plan, stream: int) -> None: ...
def sides_grad(strip: Strip, dtype: DType, args: SidesArgs, plan: Plan, stream: int) -> None: ...
def circle_stats(strip: Strip, dtype: DType, args: SidesArgs, plan: Plan, stream: int) -> None: ...
def circle_grad(strip: Strip, dtype: DType, args: SidesArgs, plan: Plan, stream: int) -> None: ...
