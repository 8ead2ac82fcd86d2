"""LASER in other people's layers: a module for each framework, which it imports alone."""
