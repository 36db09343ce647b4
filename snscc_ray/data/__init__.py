"""Images: where they are listed, how they are decoded, and how they reach a batch.

`sources` lists a dataset, `decode` opens an image, `look` samples a dataset for its size and
colours, `imageset` holds one in memory. `loading/` feeds batches, `pack/` writes Parquet shards.

Imports: config, core. Only `loading/ray_stream` imports Ray. Must not know of models or stages.
"""
