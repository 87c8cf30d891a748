"""Other programs' formats: what a run holds, written into files that they read."""

from tensorstore_fmt.interop.export import ExportReport, export

__all__ = ["ExportReport", "export"]
