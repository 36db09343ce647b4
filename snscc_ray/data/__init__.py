"""List the images of a dataset, decode them and feed them as batches.

`sources` lists a dataset, `decode` decodes an image, `look` samples a dataset for its size and
colours, `imageset` holds one in memory. `loading/` feeds batches, `pack/` writes Parquet shards.

Imports: config, core. Only `loading/ray_stream` imports Ray. Must not know of models or stages.
"""
