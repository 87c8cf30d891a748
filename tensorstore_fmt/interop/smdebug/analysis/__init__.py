"""Help for analysis, under the names that smdebug's scripts import."""
