"""A training run: its folder and how it is resumed, and several runs at once."""

from mopo_fast.utils.lazy import lazy_submodules

__getattr__, __dir__ = lazy_submodules(__name__)
