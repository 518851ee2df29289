"""`tutti launch`: renders a description of a multi-machine job as a scheduler's job file.

The description is a YAML of its own (`tutti.cluster.job`), in addition to the training configuration. Every scheduler
runs the same on each machine: torchrun, which continues with the remaining machines if one fails, and under it `tutti
train`, which resumes from the newest checkpoint. Nothing is submitted: read the file first.
"""
