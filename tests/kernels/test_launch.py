"""Where kernels run, which configuration they get, and what is copied before they do."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamahome.kernels import launch
from llamahome.kernels.launch import LaunchConfig, aligned, choose_config, default_config, is_aligned, use_triton

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that calls itself sm_90, a cache of its own for Triton, and a clock; -> what the clock was asked."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(launch, "_gpu_architecture", lambda _: "sm_90")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr("triton.testing.do_bench", lambda launch, **_: launch())
    launch._tuned.cache_clear()
    yield
    launch._tuned.cache_clear()


def test_a_cpu_runs_triton_only_in_the_interpreter(monkeypatch):
    x = torch.ones(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(x) == launch._HAS_TRITON
    monkeypatch.setattr(launch, "_HAS_TRITON", False)
    assert not use_triton(x)
    assert not use_triton(SimpleNamespace(device=CUDA))


def test_a_gpu_runs_triton_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(launch, "_HAS_TRITON", True)
    assert use_triton(SimpleNamespace(device=CUDA))
    assert not use_triton(SimpleNamespace(device=torch.device("meta")))


def test_the_modules_load_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, llamahome.kernels as kernels\n"
        "q = torch.ones(3, 1, 16); edges = torch.tensor([0, 3], dtype=torch.int32)\n"
        "assert kernels.varlen_attention(q, q, q, edges, 1.0).shape == q.shape\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda x: x, True),
        (lambda x: x[1:, :16], True),
        (lambda x: x.flatten()[:9].view(1, 9), True),  # the stride of a single row means nothing
        (lambda x: x.flatten()[1:33].view(2, 16), False),  # pointer
        (lambda x: x[:, 1:], False),  # pointer
        (lambda x: x.t(), False),  # last dimension
        (lambda x: x[:, ::2], False),  # last dimension
        (lambda x: x.flatten()[:28].view(7, 4), False),  # rows of 8 bytes, which a copy would have too
    ],
)
def test_what_is_not_aligned_is_copied(view, expected):
    x = view(torch.arange(8 * 32).bfloat16().view(8, 32))
    assert is_aligned(x) == expected
    copy = aligned(x)
    assert torch.equal(copy, x)
    assert (copy is x) == (expected or (x.is_contiguous() and x.data_ptr() % launch.ALIGNMENT == 0))
    assert copy.data_ptr() % launch.ALIGNMENT == 0


def test_every_kernel_has_a_row_for_every_architecture():
    rows = {(kernel, shape) for kernel, shape, _, _ in launch._ROWS if not kernel.startswith("attention_")}
    for kernel, shape in rows:
        for arch in (*launch._ALL, launch.INTERPRETER):
            default_config(kernel, shape, arch)
    kernels = {kernel for kernel, _, _ in launch._CONFIGS if kernel.startswith("attention_")}
    assert kernels == {"attention_forward", "attention_dq", "attention_dkv"}
    accesses = {"pointers": launch._ALL, "fp32_": launch._ALL, "tma": launch._NEWER}
    for kernel, (access, archs), size in itertools.product(kernels, accesses.items(), (64, 128, 256)):
        for arch in archs:
            default_config(kernel, f"{access}{size}", arch)
            default_config(kernel, f"{access}{size}_softcap", arch)
    assert len(launch._CONFIGS) == sum(len(archs) for _, _, archs, _ in launch._ROWS), "a row hides another"


@pytest.mark.parametrize(
    ("arch", "like"), [("sm_75", "sm_86"), ("sm_120", "sm_86"), ("sm_103", "sm_100"), ("gfx950", "gfx942")]
)
def test_an_unknown_architecture_gets_the_row_of_one_that_fits(arch, like):
    for shape in ("pointers64", "pointers128", "pointers256"):
        assert default_config("attention_dkv", shape, arch) == default_config("attention_dkv", shape, like)
    assert launch.has_tensor_descriptors(arch) == (like == "sm_100")


def test_a_small_kernel_compiles_what_it_launches():
    """Each launches by the row that `table_cases` gave the static gate, so a row cannot be changed for one alone."""
    pytest.importorskip("triton")
    cases = {}
    for path in sorted(Path(launch.__file__).parent.glob("*_triton.py")):
        module = importlib.import_module(f"llamahome.kernels.{path.stem}")
        cases |= {case.name: case for case in getattr(module, "static_cases", list)()}
    for row, name in (
        (("rms_norm", "4096"), "rms_norm 4096"), (("add_rms_norm", "lora"), "add_rms_norm lora 16"),
        (("rope", "lora"), "rope 128 lora 16"), (("gated", "rows"), "swiglu"), (("gated", "lora"), "swiglu lora 16"),
        (("cross_entropy", "columns"), "cross_entropy"), (("lora_linear", "few_rows"), "lora small 16"),
        (("lora_linear", "few_rows_nf4"), "lora small nf4 nested 16"), (("nf4_dequantize", "bytes"), "nf4 dequantize"),
    ):  # fmt: skip
        for arch in launch._ALL:
            case, (config,) = cases[f"{name}_{arch}"], launch.candidates(*row, arch)
            assert (case.archs, case.num_warps, case.num_stages) == ((arch,), config.num_warps, config.num_stages)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(KeyError):
        default_config("no_such_kernel", "pointers64", "sm_90")


def test_the_table_decides_unless_tuning_is_asked_for(gpu, monkeypatch):
    monkeypatch.delenv("LLAMAHOME_AUTOTUNE", raising=False)
    asked = []
    config = choose_config("attention_forward", "tma128", CUDA, asked.append)
    assert config == default_config("attention_forward", "tma128", "sm_90")
    assert not asked


def test_tuning_keeps_the_fastest_on_disk(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMAHOME_AUTOTUNE", "1")
    default, other = launch.candidates("attention_forward", "tma128", "sm_90")
    seconds = {default: 2.0, other: 1.0}
    assert choose_config("attention_forward", "tma128", CUDA, seconds.__getitem__) == other
    assert len(list(tmp_path.rglob("*.json"))) == 1
    launch._tuned.cache_clear()  # as in another process
    assert choose_config("attention_forward", "tma128", CUDA, lambda _: pytest.fail("timed again")) == other


def test_tuning_survives_a_torn_file_and_what_does_not_fit(gpu, monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setenv("LLAMAHOME_AUTOTUNE", "1")
    default, other = launch.candidates("attention_forward", "tma128", "sm_90")

    def run(config: LaunchConfig) -> float:
        if config == other:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    path = launch._tuning_file("attention_forward-tma128-sm_90")
    path.parent.mkdir(parents=True)
    path.write_text('{"block_m": 1')
    assert choose_config("attention_forward", "tma128", CUDA, run) == default


def test_a_cpu_never_tunes(monkeypatch):
    monkeypatch.setenv("LLAMAHOME_AUTOTUNE", "1")
    config = choose_config("attention_dq", "tma64", torch.device("cpu"), lambda _: pytest.fail("timed"))
    assert config == launch._INTERPRETED
