"""Tests, laid out like the code they test. A package, so that no other package of that name on the path shadows it."""
