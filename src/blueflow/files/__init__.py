"""The `stdout` and `jsonl` sinks and the local commit log. Imports nothing by itself."""
