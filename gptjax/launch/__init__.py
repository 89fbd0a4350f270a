"""Sweeps: the runs that a config file describes, as processes of this machine, SLURM jobs or Ray actors."""

from gptjax.launch import grid

__all__ = ["grid"]
