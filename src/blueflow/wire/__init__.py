"""Bytes in, frames, blocks and values out: the AT Protocol's encodings, without any I/O."""
