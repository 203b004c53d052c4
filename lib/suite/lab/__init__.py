"""JupyterLab on working copies: the copies, the page it opens on, and what its kernels show beside the results."""
