"""Pictures of finished and running trainings, from their run folders (tools/plot_run.py)."""
