"""How XLA compiles in the tests; compiling is most of what they do.

`conftest.py` leaves out XLA's fusion emitters for the whole session (`FLAGS`), and every
optimization in files that use its fixture `quickly`: together a fifth of the time. `as_shipped` is
`jax.jit` as users have it, where the compiler could matter: exact zeros, eager against jitted.
"""

import functools

import jax

# An unknown name ends the process, and later releases do not know all of these.
_EMITTERS = jax.__version_info__ < (0, 11)

FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
AS_SHIPPED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if _EMITTERS:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True

as_shipped = functools.partial(jax.jit, compiler_options=AS_SHIPPED)
