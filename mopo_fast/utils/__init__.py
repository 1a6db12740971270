"""Utilities that any module may use. They import nothing of the package but `errors`."""
