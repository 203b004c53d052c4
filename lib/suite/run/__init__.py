"""Notebooks run in processes of their own."""
