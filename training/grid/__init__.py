"""Evaluations of weights x tasks x data sets: planned, carried out cell by cell, gathered in one table."""
