"""How a run starts on a cluster: environment, Slurm, SageMaker, and what tools/check_cluster.py looks at."""
