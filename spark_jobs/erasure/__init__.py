"""Erasure: one random token replaces the id of a person in everything that adtally keeps, and no total changes."""
