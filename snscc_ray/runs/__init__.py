"""A run and its folder: stages one after the other, checkpoints, metrics, resume.

`plan` lists and checks what to train, `run` executes the stages, `folder` says what a run folder
holds, `identity` finds a finished stage again, `local` runs in this process, `pace` measures how
long a run will take, `monitor` logs its figures.

Imports: config, core, models, data, training. Must not import Ray.
"""
