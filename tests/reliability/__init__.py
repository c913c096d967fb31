"""Runs of `surgery` that are killed, starved and lied to; what is left is looked at as a user
would, from outside. docs/reliability.md has the figures."""
