"""The compiled kernels of `sparse_ops`; all else about the package is in pyproject.toml.

Where they cannot be compiled, the package is installed without them and does the same in plain JAX.
`SPARSEJAX_NO_KERNEL=1` leaves them out, `SPARSEJAX_NEED_KERNEL=1` fails without them (for wheels).
"""

import copy
import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

if sys.platform == "darwin":  # for this machine, not for both architectures at once
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ON_X86_64 = "x86_64" in (os.environ.get("ARCHFLAGS") or sysconfig.get_platform())
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"]
# Never -march=native: each file has its own instructions; which are used is decided at run time.
FLAGS_OF_FILE = {
    "isa_avx2.cc": ["-mavx2", "-mfma"],
    "isa_avx512.cc": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
# Free-threaded Pythons have no stable ABI yet.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildKernels(build_ext):
    """Compiles all files at once, each with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        """Links what `compiled` makes."""
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the kernels need GCC or Clang")
        os.makedirs(os.path.join(self.build_temp, "csrc"), exist_ok=True)
        linked = copy.copy(ext)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            linked.extra_objects = list(
                threads.map(lambda file: self.compiled(ext, file), ext.sources)
            )
        linked.sources = []
        super().build_extension(linked)

    def compiled(self, ext: Extension, file: str) -> str:
        """The object of one source."""
        flags = FLAGS_OF_FILE.get(os.path.basename(file), []) if ON_X86_64 else []
        [made] = self.compiler.compile(
            [file],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args + flags,
            depends=ext.depends,
        )
        return made


kernels = Extension(
    "sparsejax.sparse_ops._native",
    sources=sorted(glob("csrc/*.cc")),
    depends=sorted(
        glob("csrc/*.h") + glob("csrc/*.inl") + glob("csrc/third_party/**/*.h", recursive=True)
    ),
    include_dirs=["csrc", "csrc/third_party"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    language="c++",
    py_limited_api=STABLE_ABI,
    optional=os.environ.get("SPARSEJAX_NEED_KERNEL", "0") in ("", "0"),
)

setup(
    ext_modules=[kernels] if os.environ.get("SPARSEJAX_NO_KERNEL", "0") in ("", "0") else [],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
