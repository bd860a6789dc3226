"""A small world of drawn pictures, for trying everything without photographs."""

from .world import load_toyworld as load_toyworld
