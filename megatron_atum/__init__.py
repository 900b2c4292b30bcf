"""Megatron-ATUM: Flamingo-style vision-language training with 3D parallelism on megatron-core."""

import warnings

__version__ = "0.1.0"

# Notes of megatron-core 0.16.1 that say nothing to a user: that the optional accelerators are absent (the start-up
# banner says which kernels are used), and deprecations inside it. Here, so that they are silent whatever is imported
# first.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*torch.jit.script",
    "full scope is deprecated. Use empty cuda_graph_scope",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
