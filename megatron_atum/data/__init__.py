"""From shards on disk to microbatches: format, index, planner, images and the loader of a training step."""
