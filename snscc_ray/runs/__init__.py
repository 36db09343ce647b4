"""A run and its folder: the stages in order, checkpoints, metrics, resume.

`plan` lists the images and checks the recipe, `run` executes the stages, `finished` knows what they
leave on disk, `folder` manages the run folder, `identity` identifies finished stages, `extraction`
computes a frozen encoder's features, `banks` finds those that another run has computed, `local`
runs in this process, `pace` measures how long a run will take, `monitor` logs its metrics.

Resume: `folder` says whether a run may continue, `identity` which stages are finished, and inside
a stage `training.engine` continues from its checkpoint.

Imports: config, core, models, data, training. Must not import Ray.
"""
