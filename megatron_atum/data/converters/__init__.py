"""From published data sets to shards: images are obtained and re-encoded once, and whatever is dropped is counted."""
