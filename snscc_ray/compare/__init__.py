"""`snscc compare`: several clustering methods on the same images, in one table.

`comparison` runs the methods, `here` in this process (or on workers, which `cluster` has), `study`
holds the input of a method, `table` writes their figures, `methods/` has one file per method.

Imports: config, core, models, data, training, runs. Must not import Ray.
"""
