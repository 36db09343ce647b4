"""Ray: join a cluster, place workers, and run stages and predictions on them.

`scale` describes the workers and does not import Ray; `nodes` joins a cluster; `group` trains on a
Ray Train worker group, and `tasks` does independent work on one worker each; `run` runs a recipe on
the cluster, and `predict` predicts on it.

Imports: config, core, data, training, runs, answers. Must not define how a stage trains.
"""
