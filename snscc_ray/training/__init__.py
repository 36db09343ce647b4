"""The training loop, and the stages it drives.

`engine` is the one loop, on one device or many; `workers` is the interface it reports to; `context`
is what every stage is given; `stages/` holds Pretrain, Train and Boost.

Imports: config, core, models, data. Must not import Ray, or write a run folder.
"""
