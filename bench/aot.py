"""Compile a Triton kernel without a GPU and read what came out of the assembler.

`compile_spec` runs the whole chain to a cubin for one architecture, then counts, in the
disassembly that Triton's own cuobjdump prints: registers, spills, shared memory, the widest access
to device memory, matrix instructions, and how many bytes a thread has asked for before it first
has to wait for any of them.

Works in any process in which TRITON_INTERPRET is not set: the interpreter replaces `triton.jit`.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32
_TYPE = re.compile(r"(?P<type>[^:]+)(?::(?P<hint>1|16))?")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z0-9_.]+)\s*(?P<args>[^;]*);"
)
_WIDTH = re.compile(r"\.(?:LTC\d+B\.)?(?P<bits>U8|S8|U16|S16|64|128)\b")
_REGISTER = re.compile(r"(?<![A-Z0-9])R(\d+)(?:\.64|\.reuse)*")
# threads, registers and shared memory (bytes) of one multiprocessor
_LIMITS = {80: (2048, 65536, 163 << 10), 90: (2048, 65536, 227 << 10)}


@dataclass(frozen=True)
class AotSpec:
    """One kernel at one shape.

    Example: AotSpec("rmsnorm xl", _rmsnorm_fwd, {"x_ptr": "*bf16:16", "num_rows": "i32",
    "eps": "fp32"}, {"BLOCK": 2048}, num_warps=4, num_stages=1)
    """

    name: str  # unique in the report, "<op> <case>"
    kernel: Any  # the triton.jit function
    signature: Mapping[str, str]  # argument -> type; ":16" says divisible by 16, ":1" says it is 1
    constexprs: Mapping[str, Any]  # every other argument
    num_warps: int
    num_stages: int
    wants_wide_loads: bool = True  # False for a last stage that reads only a few values a program


@dataclass(frozen=True)
class AotReport:
    """What the assembler made of one spec."""

    name: str
    arch: int  # 80 or 90
    registers: int  # a thread
    spill_bytes: int  # a thread: stack, beside any local load or store found
    shared_bytes: int  # a program
    widest_load_bytes: int  # from device memory, one thread, one instruction
    widest_store_bytes: int  # to device memory
    num_wide_loads: int  # instructions of 16 bytes, asynchronous copies included
    num_loads: int  # instructions that read device memory
    hgmma: int  # warpgroup matrix instructions (sm_90)
    hmma: int  # warp matrix instructions
    thread_bytes_in_flight: int  # most bytes one thread has asked for before waiting for any
    programs_per_sm: int  # as registers, threads and shared memory allow
    sm_bytes_in_flight: int  # thread bytes x threads x programs
    wants_wide_loads: bool  # as the spec says


def compile_spec(spec: AotSpec, arch: int) -> AotReport:
    """Compile one spec for one architecture and measure the result.

    Raises:
        ValueError: an argument of the kernel is neither in the signature nor a constexpr, or both.
        RuntimeError: this process runs Triton's interpreter.
    """
    compiled = _compile(spec, arch)
    usage, sass = _disassemble(compiled.asm["cubin"])
    return _report(spec, arch, usage, sass, int(compiled.metadata.shared))


def sass_of(spec: AotSpec, arch: int) -> str:
    """The disassembly, for reading."""
    return _disassemble(_compile(spec, arch).asm["cubin"])[1]


def _compile(spec: AotSpec, arch: int) -> Any:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, got 1; compile in another process")
    # Fusion is set here because its default differs between Triton versions.
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(_source(spec), target=GPUTarget("cuda", arch, WARP), options=options)


def _source(spec: AotSpec) -> ASTSource:
    names = list(spec.kernel.arg_names)
    both = set(spec.signature) & set(spec.constexprs)
    neither = set(names) ^ (set(spec.signature) | set(spec.constexprs))
    if both or neither:
        raise ValueError(
            f"{spec.name}: expected each argument of the kernel once, in signature or constexprs; "
            f"got twice {sorted(both)}, missing or unknown {sorted(neither)}"
        )
    signature, constants, attrs = {}, dict(spec.constexprs), {}
    for position, name in enumerate(names):
        if name in spec.constexprs:
            signature[name] = "constexpr"
            continue
        match = _TYPE.fullmatch(spec.signature[name])
        if match is None:
            raise ValueError(f"{spec.name}: {name}: expected type or type:16, got {match}")
        signature[name] = match["type"]
        if match["hint"] == "16":
            attrs[(position,)] = [["tt.divisibility", 16]]
        elif match["hint"] == "1":
            signature[name] = "constexpr"
            constants[name] = 1
    return ASTSource(spec.kernel, signature, constants, attrs)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return tuple(  # type: ignore[return-value]
            subprocess.run(
                [tool, option, str(path)], capture_output=True, check=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )


def _report(spec: AotSpec, arch: int, usage: str, sass: str, shared: int) -> AotReport:
    registers = int(_found(r"REG:(\d+)", usage))
    stack = int(_found(r"STACK:(\d+)", usage)) + int(_found(r"LOCAL:(\d+)", usage))
    instructions = [(m["op"], m["args"]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    ops = [op for op, _ in instructions]
    # A local access without a stack frame would be a spill that -res-usage hides.
    if not stack:
        stack = sum(_width(op) for op in ops if op.split(".")[0] in ("LDL", "STL"))
    loads = [_width(op) for op in ops if _is_load(op)]
    stores = [_width(op) for op in ops if op.startswith("STG")]
    in_flight = _bytes_in_flight(instructions)
    programs = _programs_per_sm(arch, registers, shared, spec.num_warps)
    return AotReport(
        name=spec.name,
        arch=arch,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        widest_load_bytes=max(loads, default=0),
        widest_store_bytes=max(stores, default=0),
        num_wide_loads=sum(width == 16 for width in loads),
        num_loads=len(loads),
        hgmma=sum(op.startswith("HGMMA") for op in ops),
        hmma=sum(op.startswith("HMMA") for op in ops),
        thread_bytes_in_flight=in_flight,
        programs_per_sm=programs,
        sm_bytes_in_flight=in_flight * WARP * spec.num_warps * programs,
        wants_wide_loads=spec.wants_wide_loads,
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump: expected {pattern} in its output, got {text[:200]!r}")
    return match[1]


def _is_load(op: str) -> bool:
    # LDGSTS copies from device to shared memory, UBLKCP and UTMALDG are the bulk copy engine.
    return op.split(".")[0] in ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")


def _width(op: str) -> int:
    if op.startswith(("UBLKCP", "UTMALDG")):
        return 16
    match = _WIDTH.search(op)
    if match is None:
        return 4
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[match["bits"]]


def _bytes_in_flight(instructions: list[tuple[str, str]]) -> int:
    """Most bytes asked for, in program order, before any of their registers is read.

    Counts register loads by their consumers and asynchronous copies until a wait for a group; a
    loop's copies of earlier rounds are not seen, so pipelined loops are counted once.
    """
    waiting: dict[int, int] = {}  # register -> bytes of the load that fills it (4 each)
    copies = most = 0
    for op, args in instructions:
        if op.startswith("LDGSTS"):
            copies += _width(op)
        elif op.startswith("LDG."):
            target, _, address = args.partition(",")
            if _touched(address) & waiting.keys():
                waiting.clear()
            first = _REGISTER.search(target)
            if first is not None:
                width = _width(op)
                for part in range(max(width // 4, 1)):
                    waiting[int(first[1]) + part] = min(width, 4)
        else:
            if op.startswith("DEPBAR"):
                copies = 0
            if _touched(args) & waiting.keys():
                waiting.clear()
        most = max(most, sum(waiting.values()) + copies)
    return most


def _touched(args: str) -> set[int]:
    return {int(number) for number in _REGISTER.findall(args)}


def _programs_per_sm(arch: int, registers: int, shared: int, num_warps: int) -> int:
    threads, file, shared_limit = _LIMITS[arch]
    # Registers are given out a warp at a time, in units of 256; a program costs 1 KiB of shared.
    warp_registers = -(-registers * WARP // 256) * 256
    by_registers = file // warp_registers // num_warps
    by_shared = shared_limit // (shared + 1024)
    return min(threads // (WARP * num_warps), by_registers, by_shared, 32)
