"""Ray: joining a cluster, placing workers, running the stages and predictions on them.

`scale` says what workers are asked for and imports no Ray; `nodes` joins a cluster, `group` is a
Ray Train group of workers, `run` a run on it, `predict` predictions on it.

Imports: config, core, data, training, runs, answers. Must not define how a stage trains.
"""
