"""`snscc compare`: several clustering methods on the same images, in one table.

`comparison` runs the methods, `study` is what each is given, `table` writes their figures,
`methods/` holds each method in a file.

Imports: config, core, models, data, training, runs. Must not import Ray.
"""
