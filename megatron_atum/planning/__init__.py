"""What a run will cost, worked out without a device: clusters, cost model, dry run."""
