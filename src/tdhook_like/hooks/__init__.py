"""Surrogate gradients and their installation for one call; knows torch and nothing else."""
