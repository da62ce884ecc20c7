"""Runs under SLURM: what a job asks for, its script, a site's defaults, the ranks' coordinates.

srun starts every rank itself, so nothing else has to reach the nodes: no ssh, no hostfile, no MPI.
"""
