"""Labelled examples as an ordinary data set."""
