"""bench/aot.py: what it reads out of a disassembly. tests/kernels/test_budgets.py runs the rest."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
USAGE = "Function _k:\n  REG:{registers} STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:560"
# Two wide loads, one used before a third is asked for; an asynchronous copy; a store.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;  /* 0x0000000402087981 */
        /*0020*/                   LDG.E.LTC128B.64.CONSTANT R12, desc[UR4][R2.64+0x800] ;
        /*0030*/                   FADD R20, R8, R9 ;
        /*0040*/               @P1 LDG.E.U16 R16, desc[UR4][R2.64+0x10] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R39+0x80], desc[UR18][R24.64], P5 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/                   STG.E.64 desc[UR4][R4.64], R8 ;
        /*0090*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    """The script's file as a module; bench/ is no package."""
    found = importlib.util.spec_from_file_location("bench_aot", ROOT / "bench" / "aot.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def report_of(aot: ModuleType, sass: str = SASS, *, registers: int = 40, stack: int = 0) -> object:
    spec = SimpleNamespace(name="op case", num_warps=4, wants_wide_loads=True)
    usage = USAGE.format(registers=registers, stack=stack)
    return aot._report(spec, 90, usage, sass, 16384)


def test_widths_counts_and_matrix_instructions_are_read(aot: ModuleType) -> None:
    got = report_of(aot)
    assert (got.registers, got.spill_bytes, got.shared_bytes) == (40, 0, 16384)
    assert (got.num_loads, got.num_wide_loads, got.widest_load_bytes) == (4, 2, 16)
    assert got.widest_store_bytes == 8
    assert (got.hmma, got.hgmma) == (1, 0)


def test_bytes_in_flight_end_where_a_loaded_register_is_read(aot: ModuleType) -> None:
    # 16 + 8 before the addition; after it 2 + 16, less.
    assert report_of(aot).thread_bytes_in_flight == 24
    late = SASS.replace("FADD R20, R8, R9", "FADD R20, R1, R1")
    assert report_of(aot, late).thread_bytes_in_flight == 24 + 2 + 16


@pytest.mark.parametrize(
    ("registers", "programs"),
    [(40, 12), (64, 8), (80, 6), (128, 4), (255, 2)],  # 65,536 registers; 13 fit by shared memory
)
def test_programs_a_multiprocessor_follow_from_registers(
    aot: ModuleType, registers: int, programs: int
) -> None:
    got = report_of(aot, registers=registers)
    assert got.programs_per_sm == programs
    assert got.sm_bytes_in_flight == 24 * 128 * programs


def test_a_spill_shows_with_and_without_a_stack_frame(aot: ModuleType) -> None:
    assert report_of(aot, stack=48).spill_bytes == 48
    spilled = SASS + "        /*00a0*/                   STL.64 [R1+0x8], R6 ;\n"
    assert report_of(aot, spilled).spill_bytes == 8


def test_every_argument_of_a_kernel_is_wanted_once(aot: ModuleType) -> None:
    kernel = SimpleNamespace(arg_names=["x_ptr", "n", "BLOCK"])
    spec = aot.AotSpec("op case", kernel, {"x_ptr": "*bf16:16", "BLOCK": "i32"}, {"BLOCK": 8}, 4, 1)
    with pytest.raises(ValueError, match=r"twice \['BLOCK'\], missing or unknown \['n'\]"):
        aot._source(spec)
