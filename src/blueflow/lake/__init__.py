"""The lake: Parquet on S3 or in a folder that plain readers can trust. Needs the extra `lake`."""
