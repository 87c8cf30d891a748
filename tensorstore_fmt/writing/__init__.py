"""The writer: from `log` to shards and segments.

Reading order: `run` (lifecycle and flushes), `staging` (what a log call becomes), `encoders`
(chunks), `shards` and `segments` (files), `commit` (tables of a segment).
"""
