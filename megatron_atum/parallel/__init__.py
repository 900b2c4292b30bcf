"""Process layout and everything that touches megatron-core's global state."""
