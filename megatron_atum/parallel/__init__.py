"""Process layout and everything that touches megatron-core's global state.

`import megatron_atum.parallel` also silences megatron-core's notes that the optional accelerators are absent: the
start-up banner says which kernels are used.
"""

import warnings

warnings.filterwarnings(
    "ignore", message="Transformer Engine and Apex are not installed|Apex is not installed|.*torch.jit.script"
)
