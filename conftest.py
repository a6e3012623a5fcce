"""Settings of the whole test session, doctests included."""

import hypothesis
import jax

# Eight devices on one processor, so that sharded inputs are tested everywhere.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every machine, and no deadline: the first call of a shape compiles.
hypothesis.settings.register_profile("sparsejax", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("sparsejax")
