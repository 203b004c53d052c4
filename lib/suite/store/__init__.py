"""The files that a build writes into a result folder."""
