"""The same runs on the workers of a Dask cluster."""
