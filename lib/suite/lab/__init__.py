"""JupyterLab on working copies: the copies, the start page, and the progress and comparisons shown by its kernels."""
