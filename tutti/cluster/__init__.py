"""`tutti launch`: one description of a job on several machines, rendered as the file of a scheduler.

The description is a YAML of its own (`tutti.cluster.job`), beside the configuration of the training. What runs on each
machine is the same under every scheduler: torchrun, which goes on with the machines that are left, and under
it `tutti train`, which goes on from the newest checkpoint. Nothing is submitted: the file is to be read first.
"""
