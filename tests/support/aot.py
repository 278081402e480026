"""Compile kernels for GPUs that are not here, and read what the assembler made of them.

Triton ships ptxas and cuobjdump, so no GPU and no CUDA toolkit is needed; `compile_cuda` needs nvcc. Kernels under test
are named, not passed: the tests' own process interprets them (TRITON_INTERPRET), so another one compiles (ranks.py).

    kernel = aot.Kernel("r1kernels.x.triton_impl:_kernel", {"x_ptr": "*bf16", "size": "i64"}, {"BLOCK": 1024})
    (made,) = aot.compile_triton([kernel])
    assert made.spill_free and made.count("LDG", "128") >= 1
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ranks import on_ranks


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel and what it is specialized for."""

    function: str  # "module:name"; with a path to a .py file in place of the module, that file
    signature: dict[str, str]  # run-time argument -> "*bf16", "*fp32", "*i64", "i32", "i64", "fp32", ...
    constexprs: dict[str, object] = field(default_factory=dict)  # a pointer that is not passed is a constexpr None
    arch: int = 90  # compute capability times ten: 80, 90 (is sm_90a), 100
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # a thread; None: as the compiler likes
    unaligned: tuple[str, ...] = ()  # pointers and integers not known to be multiples of 16; the others are


@dataclass(frozen=True)
class Compiled:
    """What came out, for one kernel."""

    name: str
    registers: int  # a thread
    stack_bytes: int  # a thread
    local_bytes: int  # a thread
    shared_bytes: int  # a block
    opcodes: dict[str, int]  # SASS opcode with its modifiers, such as "LDG.E.128" -> instructions
    ptx: str
    loops: tuple[dict[str, int], ...] = ()  # the same of each innermost loop that reads main memory, in order

    def count(self, opcode: str, *modifiers: str) -> int:
        """Instructions with this opcode and at least these modifiers: count("LDG", "128")."""
        wanted = {opcode, *modifiers}
        return sum(n for op, n in self.opcodes.items() if op.split(".")[0] == opcode and wanted <= set(op.split(".")))

    @property
    def spill_free(self) -> bool:
        """No local memory: neither spilled registers nor arrays with run-time indices."""
        return self.stack_bytes == self.local_bytes == self.count("LDL") == self.count("STL") == 0


def compile_triton(kernels: Sequence[Kernel]) -> list[Compiled]:
    """Compile all kernels in one other process (half a second to three each; Triton caches them on disk).

    Raises:
        RuntimeError: a kernel does not compile; with the compiler's message.
    """
    (made,) = on_ranks(1, compile_here, list(kernels))
    return made


def compile_cuda(source: Path, arch: str = "sm_90a", *options: str) -> dict[str, Compiled]:
    """Compile a .cu file with nvcc. Returns mangled kernel name -> what came out.

    Raises:
        RuntimeError: it does not compile; with nvcc's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "out.cubin"), Path(folder, f"{source.stem}.ptx")
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "--keep", "--keep-dir", folder]
        done = subprocess.run([*command, *options, "-o", cubin, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"aot: {done.stderr[-4000:]}")
        return read_cubin(cubin, ptx.read_text())


def read_cubin(cubin: Path, ptx: str) -> dict[str, Compiled]:
    """Kernel name -> its resources and instructions, for every kernel of a cubin; `ptx` is that of the whole file."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _cuobjdump("-sass", cubin), re.DOTALL))
    return {
        name: Compiled(
            name, int(registers), int(stack), int(local), int(shared), _opcodes(code[name]), ptx, _loops(code[name])
        )
        for name, registers, stack, shared, local in found
    }


def _opcodes(sass: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE):
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def _loops(sass: str) -> tuple[dict[str, int], ...]:
    """A loop is what lies between a backward branch and its target."""
    lines = {int(at, 16): line for line in sass.splitlines() for at in re.findall(r"^\s+/\*([0-9a-f]+)\*/", line)}
    branches = ((at, re.search(r"\bBRA (?:\w+, )?0x([0-9a-f]+)", line)) for at, line in lines.items())
    spans = [(int(found[1], 16), at) for at, found in branches if found and int(found[1], 16) < at]
    inner = [(a, b) for a, b in sorted(spans) if not any(a <= c and d <= b for c, d in spans if (c, d) != (a, b))]
    bodies = [_opcodes("\n".join(line for at, line in lines.items() if a <= at <= b)) for a, b in inner]
    return tuple(body for body in bodies if any(op.startswith("LDG") for op in body))


def _cuobjdump(option: str, cubin: Path) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


def compile_here(kernels: list[Kernel]) -> list[Compiled]:
    """The same in this process, which must not interpret kernels."""
    return [_compile(kernel) for kernel in kernels]


def _compile(kernel: Kernel) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = _load(kernel.function)
    signature = {name: kernel.signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = [
        (i,)
        for i, name in enumerate(fn.arg_names)
        if name not in kernel.unaligned and signature[name].startswith(("*", "i", "u"))
    ]
    source = ASTSource(fn, signature, kernel.constexprs, {i: [["tt.divisibility", 16]] for i in aligned})
    # Fused multiply-adds are asked for by name: Triton is about to change the default.
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    options["maxnreg"] = kernel.max_registers
    made = triton.compile(source, target=GPUTarget("cuda", kernel.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        (compiled,) = read_cubin(Path(file.name), made.asm["ptx"]).values()
    # A Triton kernel's shared memory is asked for at the launch, so the cubin does not show it.
    return Compiled(**{**asdict(compiled), "shared_bytes": made.metadata.shared})


def _load(function: str) -> object:
    module, _, name = function.partition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    return getattr(loaded, name)
