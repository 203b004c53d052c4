"""Caches and decode paths: batches of rows, chunks of a prompt, absorbed latent attention."""
