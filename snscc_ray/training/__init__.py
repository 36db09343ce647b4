"""The training loop and its stages.

`engine` is the only loop, for one device or many; `workers` defines the interface it reports to;
`context` holds the input of every stage; `stages/` holds Pretrain, Train and Boost.

Imports: config, core, models, data. Must not import Ray, or write a run folder.
"""
