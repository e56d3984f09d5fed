"""Real servers as local processes, for development and tests.

`python -m blueflow.testing.services up NAME` runs one. Each has a module with a class to be used in
`async with`; `versions.toml` has the version of everything that is installed for them.
"""
