"""Small things that anything may use; nothing here imports more of the package than `errors`."""
