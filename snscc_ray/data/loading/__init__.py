"""Feed batches from memory (`resident`), from files each epoch (`streamed`), or with Ray Data
(`ray_stream`)."""
