"""Batches: from memory (`resident`), from files each epoch (`streamed`), or by Ray Data
(`ray_stream`)."""
