"""fusedloss._C: built from csrc/ by nvcc. It imports anywhere and needs a GPU to run."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_build
import pytest
import torch

ROOT = Path(__file__).absolute().parents[2]
STUB = (ROOT / "fusedloss" / "_C.pyi").read_text()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_the_stub_is_what_the_lists_of_fields_say():
    tool = runpy.run_path(str(ROOT / "tools" / "extension_stub.py"))
    head, marker, _ = STUB.partition(tool["MARKER"])
    assert marker and STUB == tool["written"](head), "run python tools/extension_stub.py"


@pytest.mark.host
def test_the_module_has_what_the_stub_says(host_extension):
    """By name, and every field of every struct."""
    nodes = [node for node in ast.parse(STUB).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    names = {name for name in vars(host_extension) if not name.startswith("_")}
    assert names == {node.name for node in nodes} - {"BuildInfo"}  # a dict
    values = {"int": 1, "float": 0.5, "bool": True, "Pointer": 256, "list[Pointer]": [256, None]}
    values["DType"] = host_extension.DType.float16
    made = 0
    for node in nodes:
        if isinstance(node.body[0], ast.FunctionDef):
            fields = {field.arg: ast.unparse(field.annotation) for field in node.body[0].args.kwonlyargs}
            given = {
                name: values[kind] if kind in values else getattr(host_extension, kind)()
                for name, kind in fields.items()
            }
            getattr(host_extension, node.name)(**given)
            made += 1
    assert made > 15


@pytest.fixture(scope="module")
def _C() -> ModuleType:
    """The build whose kernels test_cuda_resources.py reads."""
    return cuda_build.load()


@pytest.mark.slow
def test_build_info(_C):
    info = _C.build_info()
    assert int(info["cuda_version"].split(".")[0]) >= 12
    assert info["archs"] and all(arch.startswith(("sm_", "compute_")) for arch in info["archs"])


@pytest.mark.slow
def test_launch_without_a_gpu_names_the_cuda_error(_C, tmp_path):
    code = (
        "import importlib.util, sys\n"
        "specification = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "_C = importlib.util.module_from_spec(specification)\n"
        "specification.loader.exec_module(_C)\n"
        "_C.scale_rows(_C.ScaleRowsParams(input=256, out=512, M=1, D=1, in_stride=1, out_stride=1), stream=0)"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, _C.__file__], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RuntimeError: scale_rows: cudaError" in done.stderr


@pytest.mark.slow
def test_nothing_to_do_needs_no_gpu(_C):
    _C.scale_rows(_C.ScaleRowsParams(M=0, D=5, in_stride=5, out_stride=5), stream=0)
    _C.scale_rows(_C.ScaleRowsParams(M=5, D=0), stream=0)
    _C.prepare(_C.PrepareParams(x=256, y=512, score=1024), stream=0)
    _C.merge(_C.MergeParams(n_tiles=3), stream=0)
    _C.settle(_C.SettleParams(n_tiles=3), stream=0)
    _C.weigh(_C.WeighParams(R=3), stream=0)
    _C.finish(_C.FinishParams(R=3), stream=0)


@pytest.mark.slow
def test_negative_sizes(_C):
    with pytest.raises(ValueError, match="scale_rows: negative M"):
        _C.scale_rows(_C.ScaleRowsParams(M=-1, D=5, in_stride=5, out_stride=5), stream=0)
    with pytest.raises(ValueError, match="settle: negative R"):
        _C.settle(_C.SettleParams(n_tiles=1, R=-1), stream=0)


@pytest.mark.slow
def test_fields(_C):
    with pytest.raises(TypeError, match=r"MergeParams\.tiles: no such field"):
        _C.MergeParams(R=1, tiles=3)
    for value in (-1, 0.5, "x"):
        with pytest.raises(TypeError, match=r"MergeParams\.sum cannot be"):
            _C.MergeParams(sum=value)
    _C.MergeParams(max=None, sum=2**64 - 1)


def scale_rows(_C, x, out, row_factor, scalar):
    assert out.stride(1) == 1
    params = _C.ScaleRowsParams(
        input=x.data_ptr(),
        out=out.data_ptr(),
        in_dtype=getattr(_C.DType, str(x.dtype).removeprefix("torch.")),
        out_dtype=getattr(_C.DType, str(out.dtype).removeprefix("torch.")),
        row_factor=0 if row_factor is None else row_factor.data_ptr(),
        scalar=0 if scalar is None else scalar.data_ptr(),
        M=x.shape[0],
        D=x.shape[1],
        in_stride=x.stride(0),
        in_stride_d=x.stride(1),
        out_stride=out.stride(0),
    )
    _C.scale_rows(params, torch.cuda.current_stream().cuda_stream)


# fmt: off
SHAPES = [  # M, D, pad, offset: rows of D elements, D + pad apart, the first one `offset` elements into the buffer
    (1, 1, 0, 0),          # a tail alone
    (5, 8, 0, 0),          # one vector of halves, two of floats
    (257, 768, 0, 0),      # vectors alone
    (33, 1030, 2, 0),      # aligned rows, vectors and a tail
    (33, 1030, 0, 0),      # a stride that breaks the alignment of the rows
    (33, 1024, 0, 1),      # a base that does
    (3, 100_003, 5, 0),    # several blocks on a row
    (600_000, 4, 4, 0),    # more rows than blocks of rows
]
# fmt: on


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, D, pad, offset", SHAPES)
@pytest.mark.parametrize("factors", ["both", "row", "scalar", "none"])
def test_scale_rows(_C, dtype, M, D, pad, offset, factors):
    def matrix(dtype, fill):
        flat = torch.full((offset + M * (D + pad),), fill, dtype=dtype, device="cuda")
        return flat, flat[offset:].view(M, D + pad)[:, :D]

    _, x = matrix(torch.float32, 0.0)
    x.copy_(torch.randn(M, D, device="cuda") * 300)  # reaches beyond fp16
    row_factor = torch.randn(M, device="cuda") if factors in ("both", "row") else None
    scalar = torch.randn(1, device="cuda") if factors in ("both", "scalar") else None
    flat, out = matrix(dtype, 7.0)
    scale_rows(_C, x, out, row_factor, scalar)

    want_flat, want = matrix(dtype, 7.0)
    exact = x if row_factor is None else x * row_factor[:, None]
    want.copy_(exact if scalar is None else exact * scalar)
    assert torch.equal(flat, want_flat)  # the same roundings, and nothing written between the rows


@pytest.mark.gpu
def test_scale_rows_in_place_and_special_values(_C):
    x = torch.tensor([[float("nan"), float("inf"), -0.0, 1e30, 1e-42]], device="cuda").expand(9, 5).contiguous()
    row_factor = torch.full((9,), 1e-3, device="cuda")
    want = x * row_factor[:, None]
    scale_rows(_C, x, x, row_factor, None)
    torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.slow
def test_scale_rows_addresses_beyond_2_31(_C):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    M, D = 2**20 + 1, 2**11 + 8
    x = torch.ones(M, D, device="cuda")
    out = torch.zeros(M, D, device="cuda", dtype=torch.bfloat16)
    row_factor = torch.arange(M, device="cuda", dtype=torch.float32)
    scale_rows(_C, x, out, row_factor, None)
    for rows in (slice(0, 3), slice(M - 3, M)):
        assert torch.equal(out[rows], row_factor[rows, None].expand(-1, D).bfloat16())
