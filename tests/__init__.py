"""Tests, in the tree of what they test. A package, so that no other one of that name on the path takes its place."""
