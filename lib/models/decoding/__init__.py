"""Caches and decode paths: batches of rows, chunked prompts, absorbed latent attention."""
